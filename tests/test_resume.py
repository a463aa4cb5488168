"""Runs that survive: resume, faults while saving and loading, signals, evaluation of a saved run."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TWINS, build
from test_runs import scalars

SMALL = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "max_episode_steps": 20}
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
    for name, script in TWINS.items():
        runs[name] = tmp_path_factory.mktemp("whole") / name
        script.main(script.Args(run_dir=str(runs[name]), **RUN))
    return runs


@pytest.mark.parametrize("name", TWINS)
def test_a_run_killed_again_and_again_ends_like_one_left_alone(name, whole, tmp_path):
    run, rng = tmp_path / "run", random.Random(name)
    process = start(name, run_dir=run, **RUN)
    for _ in range(5):
        deadline = time.monotonic() + 60
        while not list(run.glob("checkpoint-*.pt")) and time.monotonic() < deadline:
            time.sleep(0.02)
        before = {path.name for path in run.glob("*checkpoint-*")}
        while {path.name for path in run.glob("*checkpoint-*")} == before and process.poll() is None:
            time.sleep(0.001)  # until something is saved: the kill often falls into the save itself
        time.sleep(rng.choice([0, 0, rng.random() * 0.3]))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = start(name, resume=run)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    same_end(whole[name], run)


@pytest.mark.parametrize("name", TWINS)
def test_sigterm_saves_and_exits_cleanly(name, tmp_path):
    run = tmp_path / "run"
    process = start(name, run_dir=run, **{**RUN, "total_timesteps": 100_000})
    while not (run / "checkpoint-64.pt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"--resume {run}" in output
    newest = TWINS[name].checkpoint_paths(run)[0]
    assert int(newest.stem.split("-")[1]) >= 64 and not (run / "model.pt").exists()
    step = int(newest.stem.split("-")[1])
    code, _, errors = finish(name, resume=run, total_timesteps=step + 32)
    assert code == 0, errors
    assert (run / "model.pt").exists()


@pytest.fixture
def saved(script, whole, tmp_path):
    """A copy of a finished run, to be damaged; its checkpoints are at 192 and 256."""
    name = script.__name__
    run = tmp_path / name
    shutil.copytree(whole[name], run)
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


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "malicious"])
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
        state["progress"] = Malice()
        torch.save(state, newest)
    resume(script, saved)
    assert f"warning: {newest} cannot be read" in capsys.readouterr().err
    assert not Malice.struck
    same_end(whole[script.__name__], saved)


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
    with pytest.raises(SystemExit, match="is not the folder of a run"):
        script.main(script.Args(resume=str(saved / "nothing")))
    (saved / "args.json").write_text("{")
    with pytest.raises(SystemExit, match="args.json is damaged"):
        script.main(script.Args(resume=str(saved)))


def test_a_run_of_the_twin_is_refused(whole):
    names = list(TWINS)
    for name, other in (names, names[::-1]):
        with pytest.raises(SystemExit, match=f"is a run of {other}.py"):
            TWINS[name].main(TWINS[name].Args(resume=str(whole[other])))


def test_a_flag_given_on_resume_is_compared_even_at_its_default(whole):
    run = whole["ppo_atari_baseline"]
    code, _, errors = finish("ppo_atari_baseline", resume=run, num_envs=8)
    assert code == 1 and errors == f"error: {run} was trained with --num-envs 2, not 8; resume it without --num-envs\n"


def test_a_removed_folder_or_full_disk_ends_the_run_with_one_line(script, tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = script.save_checkpoint

    def save(run_dir, parts, progress):
        if progress["global_step"] == 64:
            shutil.rmtree(run_dir)
        real(run_dir, parts, progress)

    monkeypatch.setattr(script, "save_checkpoint", save)
    with pytest.raises(SystemExit, match="checkpoint-64.pt cannot be written: No such file or directory"):
        script.main(script.Args(run_dir=str(run), **RUN))


def test_a_full_disk_leaves_the_checkpoint_before(script, saved, monkeypatch):
    newest = script.checkpoint_paths(saved)[0]
    before = newest.read_bytes()

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="No space left on device; what was saved before is untouched"):
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
    expected = "the parameter leader.conv" if where == "parameter" else "is not finite"
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


def test_evaluate_repeats_the_evaluation_after_training(script, saved, capsys):
    after_training = json.loads((saved / "evaluation.json").read_text())
    (saved / "evaluation.json").unlink()
    assert script.main(script.Args(evaluate=str(saved), eval_episodes=2, threads=1)) == after_training
    assert json.loads((saved / "evaluation.json").read_text()) == after_training
    (saved / "model.pt").unlink()  # a run that was stopped: from its newest checkpoint
    assert script.main(script.Args(evaluate=str(saved), eval_episodes=2, threads=1)) == after_training
    with pytest.raises(SystemExit, match="at least one game"):
        script.main(script.Args(evaluate=str(saved), eval_episodes=0))


def test_loaded_agent_acts_identically(script, saved):
    args = script.read_args(saved)
    agents = [build(script, args)[:2] for _ in range(2)]
    for leader, follower in agents:
        script.load_agent(saved, leader, follower)
    obs = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 4, 84, 84), dtype=np.uint8))
    with torch.no_grad():
        (first, _), (second, _) = (follower(leader(obs)) for leader, follower in agents)
    assert torch.equal(first, second)
