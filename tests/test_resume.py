"""Runs that survive: resume, faults while saving and loading, signals, evaluation of a saved run."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ATARI, ROOT, TWINS, build
from test_runs import scalars

SMALL = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "max_episode_steps": 20}
SMALL |= {"device": "cpu"}
RUN = {**SMALL, "total_timesteps": 256, "checkpoint_interval": 64, "eval_episodes": 2, "anneal_lr": True, "threads": 1}


def start(name, *flags, **settings):
    """The script in a process of its own, to be killed."""
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    for key, value in settings.items():
        flag = key.replace("_", "-")
        command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(name, *flags, **settings):
    process = start(name, *flags, **settings)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def same_end(a, b):
    """Bit-identical weights, scalars and evaluation."""
    assert scalars(a) == scalars(b)
    assert json.loads((a / "evaluation.json").read_text()) == json.loads((b / "evaluation.json").read_text())
    models = [torch.load(run / "model.pt", weights_only=True) for run in (a, b)]
    for player in ("leader", "follower"):
        for name, tensor in models[0][player].items():
            assert torch.equal(tensor, models[1][player][name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of each twin."""
    runs = {}
    for name, script in ATARI.items():
        runs[name] = tmp_path_factory.mktemp("whole") / name
        script.main(script.Args(run_dir=str(runs[name]), **RUN))
    return runs


@pytest.mark.parametrize(("name", "kills"), [(name, 5 if name == "sprig_atari" else 3) for name in ATARI])
def test_a_run_killed_again_and_again_ends_like_one_left_alone(name, kills, tmp_path):
    settings = {**RUN, "total_timesteps": 32 * (kills + 6), "checkpoint_interval": 32}
    whole, run, rng = tmp_path / "whole", tmp_path / "run", random.Random(name)
    ATARI[name].main(ATARI[name].Args(run_dir=str(whole), **settings))
    process = start(name, run_dir=run, **settings)
    wait_for(lambda: (run / "checkpoint-0.pt").exists(), process)
    for _ in range(kills):
        before = set(os.listdir(run))
        wait_for(lambda before=before: set(os.listdir(run)) != before, process)  # often in the middle of a save
        time.sleep(rng.choice([0, 0, rng.random() * 0.1]))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
        process = start(name, resume=run)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    same_end(whole, run)


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


@pytest.mark.parametrize("name", TWINS)
def test_sigterm_saves_and_exits_cleanly(name, tmp_path):
    run = tmp_path / "a run"
    process = start(name, run_dir=run, **{**RUN, "total_timesteps": 100_000})
    wait_for((run / "checkpoint-64.pt").exists, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"--resume '{run}'" in output
    step = int(TWINS[name].checkpoint_paths(run)[0].stem.split("-")[1])
    assert step >= 64 and not (run / "model.pt").exists()
    process = start(name, resume=run, total_timesteps=step + 32, eval_episodes=60)
    wait_for((run / "model.pt").exists, process)  # the evaluation has begun, or is about to
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and (f"--resume '{run}'" in output or "run saved" in output), errors
    assert "Traceback" not in errors


def test_a_signal_during_the_last_save_is_obeyed(script, tmp_path, monkeypatch, capsys):
    saves, save = [], script.save_checkpoint

    def interrupted(run_dir, parts, progress):
        save(run_dir, parts, progress)
        saves.append(progress["global_step"])
        if saves[-1] == 64:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(script, "save_checkpoint", interrupted)
    settings = {**RUN, "total_timesteps": 64, "checkpoint_interval": 0}
    assert script.main(script.Args(run_dir=str(tmp_path / "run"), **settings)) == {} and saves == [0, 64]
    assert "stopped at step 64; continue with: python" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model.pt").exists()
    assert resume(script, tmp_path / "run")["returns"], "what was left to do is the evaluation"


def test_a_signal_during_the_evaluation_ends_it_and_the_run_can_go_on(script, tmp_path, monkeypatch, capsys):
    run, real = tmp_path / "run", torch.random.fork_rng

    def interrupted(**options):  # called as the first game begins
        signal.raise_signal(signal.SIGTERM)
        return real(**options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.random, "fork_rng", interrupted)
        settings = {**RUN, "total_timesteps": 64, "checkpoint_interval": 0}
        assert script.main(script.Args(run_dir=str(run), **settings)) == {}
    assert "stopped at step 64; continue with: python" in capsys.readouterr().out
    assert (run / "model.pt").exists() and not (run / "evaluation.json").exists()
    assert resume(script, run)["returns"]


@pytest.fixture
def saved(script, whole, tmp_path):
    """A copy of a finished run, to be damaged; its checkpoints are at 192 and 256."""
    run = tmp_path / script.__name__
    shutil.copytree(whole[script.__name__], run)
    return run


def resume(script, run, **changes):
    args = script.dataclasses.replace(script.read_args(run), resume=str(run), **changes)
    return script.main(args)


def test_two_checkpoints_are_kept_and_a_run_can_be_extended(script, saved):
    assert [path.name for path in script.checkpoint_paths(saved)] == ["checkpoint-256.pt", "checkpoint-192.pt"]
    before = scalars(saved)
    resume(script, saved, total_timesteps=320)
    after = scalars(saved)
    assert after["losses/entropy"][:8] == before["losses/entropy"] and len(after["losses/entropy"]) == 10
    assert (saved / "model-1.pt").exists() and (saved / "evaluation-1.json").exists(), "the first end is kept"
    first, second = (torch.load(saved / name, weights_only=True)["follower"] for name in ("model-1.pt", "model.pt"))
    assert not torch.equal(first["hidden.weight"], second["hidden.weight"])


def test_a_run_cannot_be_resumed_to_a_step_that_lies_behind_it(script, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(SystemExit, match="--total-timesteps 128: .* has taken 256 already"):
        resume(script, saved, total_timesteps=128)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before, "nothing is changed"


DAMAGES = ["truncated", "flipped", "foreign", "incomplete", "other networks", "not finite", "malicious"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(script, saved, whole, damage, capsys):
    newest, older = script.checkpoint_paths(saved)
    data = bytearray(newest.read_bytes())
    if damage == "truncated":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
    elif damage == "foreign":
        newest.write_text("not a checkpoint")
    else:
        state = torch.load(newest, weights_only=True)
        if damage == "incomplete":
            del state["leader_optimizer"]
        elif damage == "other networks":
            state["leader"] = {"conv.weight": torch.zeros(3)}
        elif damage == "not finite":
            next(iter(state["follower"].values()))[0] = float("nan")
        else:
            state["progress"] = Malice()
        torch.save(state, newest)
    resume(script, saved)
    assert f"warning: {newest} cannot be read" in capsys.readouterr().err
    assert not Malice.struck
    same_end(whole[script.__name__], saved)


def test_past_two_unreadable_checkpoints_a_run_still_keeps_its_last_two(script, saved):
    for path in script.checkpoint_paths(saved):
        path.write_bytes(b"")
    shutil.copy(saved / "model.pt", saved / "checkpoint-200.pt")  # a third of no use
    args = script.dataclasses.replace(script.read_args(saved), eval_episodes=0, total_timesteps=128)
    script.main(script.dataclasses.replace(args, run_dir=str(saved.parent / "short")))  # up to before them
    for path in script.checkpoint_paths(saved.parent / "short"):
        shutil.copy(path, saved)
    resume(script, saved, total_timesteps=192, eval_episodes=0)
    steps = [int(path.stem.split("-")[1]) for path in script.checkpoint_paths(saved)]
    assert steps == [256, 200, 192, 128], "what was unreadable stays, and takes no other's place"
    resume(script, saved, total_timesteps=192, eval_episodes=0)


class Malice:
    """Runs code when it is unpickled without care."""

    struck = False

    def __reduce__(self):
        return strike, ()


def strike():
    Malice.struck = True


def test_malice_would_have_struck():
    pickle.loads(pickle.dumps(Malice()))
    assert Malice.struck
    Malice.struck = False


def test_no_readable_checkpoint_is_an_error_and_changes_nothing(script, saved):
    for path in script.checkpoint_paths(saved):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="holds no checkpoint that can be read"):
        resume(script, saved)


def test_changed_arguments_are_refused_by_name(script, saved):
    with pytest.raises(SystemExit, match="trained with --gamma 0.99, not 0.9"):
        resume(script, saved, gamma=0.9)
    with pytest.raises(SystemExit, match="give one of the two"):
        resume(script, saved, evaluate=str(saved))
    with pytest.raises(SystemExit, match="is not the folder of a run"):
        script.main(script.Args(resume=str(saved / "nothing")))
    record = json.loads((saved / "args.json").read_text())
    del record["arguments"]["gae_lambda"]
    (saved / "args.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="was made by a version without --gae-lambda"):
        resume(script, saved)
    (saved / "args.json").write_text("{")
    with pytest.raises(SystemExit, match="args.json is damaged"):
        script.main(script.Args(resume=str(saved)))


@pytest.mark.parametrize(("name", "value"), {"num_envs": "2", "env_id": None, "gamma": "0.99", "norm_adv": 1}.items())
def test_a_saved_argument_of_another_type_is_named(script, saved, name, value):
    record = json.loads((saved / "args.json").read_text())
    record["arguments"][name] = value
    (saved / "args.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=f"args.json is damaged.*: --{name.replace('_', '-')} must be .*, not "):
        script.read_args(saved)


def test_what_has_changed_since_training_is_named_wherever_the_run_is_loaded(script, saved, capsys):
    args = script.dataclasses.replace(script.read_args(saved), evaluate=str(saved))
    script.main(args)
    assert "warning" not in capsys.readouterr().err
    record = json.loads((saved / "args.json").read_text())
    record["versions"] |= {"script": "another text", "numpy": "1.0"}
    (saved / "args.json").write_text(json.dumps(record))
    script.main(args)
    resume(script, saved, total_timesteps=288)
    first, second = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    now = script.versions()
    assert first == second and f"script another text, now {now['script']}; numpy 1.0, now {now['numpy']}: no" in first


def test_a_run_that_was_moved_is_evaluated(saved, script, tmp_path):
    moved = saved.rename(tmp_path / "moved here")
    args = script.dataclasses.replace(script.read_args(moved), evaluate=str(moved), run_dir="")
    assert len(script.main(args)["returns"]) == 2


INTERRUPTED = """
import runpy, signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers hand on that it is ignored
torch.random.fork_rng = lambda **options: signal.raise_signal(signal.SIGINT)  # as the first game begins
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_interrupted_evaluation_ends_with_one_line(saved, script):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    command = [sys.executable, "-c", INTERRUPTED, str(ROOT / f"{script.__name__}.py"), f"--evaluate={saved}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr == "error: interrupted; nothing was saved\n", result.stderr
    assert not result.stdout and {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_no_file_is_moved_if_the_new_one_cannot_be_written(script, saved, monkeypatch):
    def files():
        return {path.name: path.read_bytes() for path in saved.iterdir() if not path.name.startswith("events")}

    def full(_):
        raise OSError(28, "No space left on device")

    before, args = files(), script.read_args(saved)
    monkeypatch.setattr(script.os, "fsync", full)
    for changes in ({"resume": str(saved), "total_timesteps": 320}, {"evaluate": str(saved)}):
        with pytest.raises(SystemExit, match="cannot be written: No space left on device; what was saved before is"):
            script.main(script.dataclasses.replace(args, **changes))
        assert files() == before


def test_a_run_of_the_twin_is_refused(whole):
    names = list(TWINS)
    for name, other in (names, names[::-1]):
        with pytest.raises(SystemExit, match=f"is a run of {other}.py"):
            TWINS[name].main(TWINS[name].Args(resume=str(whole[other])))


def test_a_flag_given_on_resume_is_compared_even_at_its_default(whole):
    run = whole["ppo_atari_baseline"]
    code, _, errors = finish("ppo_atari_baseline", resume=run, num_envs=8)
    assert code == 1 and errors == f"error: {run} was trained with --num-envs 2, not 8; leave out --num-envs\n"


def test_a_folder_removed_between_two_iterations_ends_the_run_with_one_line(script, tmp_path, monkeypatch):
    run, real = tmp_path / "run", script.update

    def update(*inputs):
        shutil.rmtree(run, ignore_errors=True)
        return real(*inputs)

    monkeypatch.setattr(script, "update", update)
    with pytest.raises(SystemExit, match=f"error: {run}.* cannot be written: No such file or directory"):
        script.main(script.Args(run_dir=str(run), **RUN))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB: room for a first checkpoint, not for a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", TWINS)
def test_a_disk_that_is_full_ends_the_run_with_one_line(name, small_disk):
    run = small_disk / "run"
    code, _, errors = finish(name, run_dir=run, **RUN)
    assert code == 1 and "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]  # beside the progress bar
    assert line.startswith(f"error: {run}") and "No space left on device" in line
    assert TWINS[name].checkpoint_paths(run), "what was saved before is still there"
    leader, follower, *_ = build(TWINS[name], TWINS[name].read_args(run))
    TWINS[name].load_agent(run, leader, follower)


def test_a_full_disk_leaves_the_checkpoint_before(script, saved, monkeypatch):
    newest = script.checkpoint_paths(saved)[0]
    before = newest.read_bytes()

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        script.write_atomically(newest, b"half")
    assert newest.read_bytes() == before and not list(saved.glob(".*"))


@pytest.mark.parametrize("where", ["observation", "parameter"])
def test_a_value_that_is_not_finite_stops_before_the_step(script, where):
    args = script.Args()
    leader, follower, *optimizers = build(script, args)
    obs = torch.randint(0, 256, (8, 84, 84, 4), dtype=torch.uint8).permute(0, 3, 1, 2)
    advantages = torch.randn(8)
    if where == "observation":
        advantages[3] = float("nan")
    else:
        next(leader.parameters()).data[0, 0] = float("inf")
    batch = script.Batch(obs, torch.zeros(8).long(), torch.zeros(8), torch.zeros(8), advantages, torch.randn(8))
    before = [p.clone() for module in (leader, follower) for p in module.parameters()]
    first = next(name for name, _ in leader.named_parameters())
    expected = re.escape(f"the parameter leader.{first}") if where == "parameter" else "is not finite"
    with pytest.raises(FloatingPointError, match=expected):
        script.update(leader, follower, *optimizers, batch, script.dataclasses.replace(args, minibatch_size=8))
    after = [p for module in (leader, follower) for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after) if a.isfinite().all())


def test_a_run_that_diverges_names_iteration_and_checkpoint(script, tmp_path, monkeypatch):
    def diverged(*inputs):
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(script, "update", diverged)
    with pytest.raises(SystemExit, match="iteration 1: the loss is not finite; the last good checkpoint is .*-0.pt"):
        script.main(script.Args(run_dir=str(tmp_path / "run"), **RUN))


def test_a_real_divergence_is_caught_before_it_is_saved(script, tmp_path):
    settings = {**RUN, "checkpoint_interval": 32, "learning_rate": 1e30, "anneal_lr": False}
    with pytest.raises(SystemExit, match="iteration 1: the .* is not finite; the last good checkpoint is .*-0.pt"):
        script.main(script.Args(run_dir=str(tmp_path / "run"), **settings))
    assert [path.name for path in script.checkpoint_paths(tmp_path / "run")] == ["checkpoint-0.pt"]


def test_evaluate_in_a_new_process_repeats_the_evaluation_after_training(script, saved):
    after_training = json.loads((saved / "evaluation.json").read_text())
    code, output, errors = finish(script.__name__, evaluate=saved)
    assert code == 0 and "evaluation over 2 games" in output, errors
    assert json.loads((saved / "evaluation.json").read_text()) == after_training
    assert json.loads((saved / "evaluation-1.json").read_text()) == after_training, "the first one is kept"
    (saved / "model.pt").unlink()  # a run that was stopped: from its newest checkpoint
    args = script.dataclasses.replace(script.read_args(saved), evaluate=str(saved))
    assert script.main(args) == after_training
    with pytest.raises(SystemExit, match="at least one game"):
        script.main(script.dataclasses.replace(args, eval_episodes=0))
    with pytest.raises(SystemExit, match="leave out --seed"):
        script.main(script.dataclasses.replace(args, seed=7))


def test_a_loaded_agent_acts_like_the_trained_one(script, tmp_path, monkeypatch):
    obs = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 4, 84, 84), dtype=np.uint8))
    seen = []

    def evaluate(leader, follower, args, device, stop):
        with torch.no_grad():
            seen.append(follower(leader(obs))[0])
        return {"returns": [0.0], "lengths": [1], "mean": 0.0, "std": 0.0}

    monkeypatch.setattr(script, "evaluate", evaluate)
    script.main(script.Args(run_dir=str(tmp_path / "run"), **{**RUN, "total_timesteps": 64}))
    leader, follower, *_ = build(script, script.read_args(tmp_path / "run"))
    script.load_agent(tmp_path / "run", leader, follower)
    with torch.no_grad():
        assert torch.equal(follower(leader(obs))[0], seen[0])


def test_a_gpu_that_cannot_be_used_does_not_disturb_a_run_on_the_cpu(script, tmp_path, monkeypatch):
    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 1)  # the driver is there, but not for this PyTorch
    monkeypatch.setattr(torch.cuda.random, "_lazy_init", too_old)
    args = script.Args(run_dir=str(tmp_path / "run"), **{**RUN, "total_timesteps": 64, "eval_episodes": 0})
    script.main(args)
    script.main(script.dataclasses.replace(args, resume=str(tmp_path / "run"), total_timesteps=128))
    assert (tmp_path / "run" / "checkpoint-128.pt").exists()
