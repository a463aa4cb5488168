"""Runs that are stopped, killed, damaged or moved go on as if nothing had happened, or say in one line why not."""

import functools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import time
from itertools import permutations
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import (
    ATARI,
    CONTINUOUS,
    SCRIPTS,
    TWINS,
    Process,
    contents,
    games,
    resume,
    same_end,
    set_clock,
    small,
    strike,
    weights,
    words,
)
from test_runs import events, scalars


@pytest.fixture
def saved(any_script, finished, tmp_path):
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(finished(any_script).run, tmp_path / "run")


def start(script, folder, *hooks, **changes):
    """The small run in a process of its own, in `folder`/run."""
    return Process(script, folder, *words(run_dir=folder / "run", **small(script, **changes)), before=hooks)


# ---- Killed ------------------------------------------------------------------------------------------------------
def test_a_run_killed_again_and_again_ends_like_one_left_alone(any_script, finished, tmp_path):
    """Each sitting is killed as it is about to open or rename some file, or some time after its start."""
    run, rng, died = tmp_path / "run", random.Random(any_script.__name__), 0
    process = start(any_script, tmp_path, functools.partial(strike, run, rng.randrange(5, 12), signal.SIGKILL))
    for count in rng.sample(range(1, 18), 5):
        code, _, errors = process.wait()
        died += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), errors
        process = Process(any_script, tmp_path, "--resume", str(run), before=[functools.partial(strike, run, count, 9)])
    process.wait()
    for _ in range(2):
        process = Process(any_script, tmp_path, "--resume", str(run))
        time.sleep(rng.random())
        process.process.kill()
        process.wait()
    code, _, errors = Process(any_script, tmp_path, "--resume", str(run)).wait()
    assert code == 0 and died >= 3, errors
    same_end(finished(any_script).run, run)
    assert scalars(finished(any_script).run) == scalars(run)


@pytest.mark.parametrize("name", ATARI)
def test_an_atari_run_is_resumed_exactly(name, tmp_path):
    script, whole, run = ATARI[name], tmp_path / "whole", tmp_path / "run"
    settings = {"env_id": "ALE/Breakout-v5", "total_timesteps": 128, "checkpoint_interval": 64, "num_steps": 32}
    script.main(script.Args(run_dir=str(whole), **small(script, **settings)))
    script.main(script.Args(run_dir=str(run), **small(script, **settings | {"total_timesteps": 64})))
    resume(script, run, total_timesteps=128)
    same_end(whole, run)


def test_a_run_can_be_extended(any_script, finished, tmp_path):
    run = tmp_path / "run"
    any_script.main(any_script.Args(run_dir=str(run), **small(any_script, total_timesteps=256)))
    argv, killed = ("--resume", str(run), "--total-timesteps", "384"), functools.partial(strike, run / "episodes", 2, 9)
    assert Process(any_script, tmp_path, *argv, before=[killed]).wait()[0] == -9
    assert not (run / "model.pt").exists() and not (run / "evaluation.json").exists(), "of an end that is none now"
    assert Process(any_script, tmp_path, *argv).wait()[0] == 0
    same_end(finished(any_script).run, run)
    assert scalars(finished(any_script).run) == scalars(run)
    assert json.loads((run / "args.json").read_text())["arguments"]["total_timesteps"] == 384


# ---- Signals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_the_first_signal_saves_and_says_how_to_go_on(any_script, number, tmp_path):
    """Between two checkpoints: the signal comes as the second rollout's games are written down."""
    run = tmp_path / "a run"
    settings = small(any_script, run_dir=run, checkpoint_interval=0)
    hook = functools.partial(strike, run / "episodes.csv", 2, number)
    code, _, errors = Process(any_script, tmp_path, *words(**settings), before=[hook]).wait()
    assert code == 0 and "stopped at step 128; go on with: python " in errors and "Traceback" not in errors
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 128 and not (run / "model.pt").exists()
    assert games(run) and any_script.load_agent(run)[0].resume is None
    script, *flags = shlex.split(re.search("go on with: python (.*)", errors)[1])
    assert Path(script).name == f"{any_script.__name__}.py"
    before = games(run)
    code, output, errors = Process(any_script, tmp_path, *flags).wait()
    assert code == 0 and "evaluation over 2 games" in output, errors
    steps = [step for step, _ in scalars(run)["losses/entropy"]]
    assert games(run)[: len(before)] == before and steps == [64, 128, 192, 256, 320, 384]


def test_a_signal_during_a_save_is_obeyed_after_it(any_script, finished, tmp_path):
    hook = functools.partial(strike, tmp_path / "run" / ".checkpoint.pt.tmp", 4, signal.SIGTERM)  # the second rename
    code, _, errors = start(any_script, tmp_path, hook).wait()
    assert code == 0 and "stopped at step 128" in errors
    assert Process(any_script, tmp_path, "--resume", str(tmp_path / "run")).wait()[0] == 0
    same_end(finished(any_script).run, tmp_path / "run")


def test_a_second_signal_ends_at_once_and_loses_nothing_saved(any_script, finished, tmp_path):
    hook = functools.partial(strike, tmp_path / "run" / "episodes.csv", 3, signal.SIGINT, signal.SIGTERM)
    code, *_ = start(any_script, tmp_path, hook).wait()
    assert code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 128
    resume(any_script, tmp_path / "run")
    same_end(finished(any_script).run, tmp_path / "run")


def interrupt_evaluation(run, number):
    """Called in a run: sends it a signal at each step that is taken after the training."""

    def paid(reward):
        if (run / "model.pt").exists():
            os.kill(os.getpid(), number)
        return reward

    real = gym.make
    gym.make = lambda *names, **options: gym.wrappers.TransformReward(real(*names, **options), paid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_whose_evaluation_is_interrupted_can_go_on(any_script, number, finished, tmp_path):
    run = tmp_path / "run"
    code, output, errors = start(any_script, tmp_path, functools.partial(interrupt_evaluation, run, number)).wait()
    assert not output and "Traceback" not in errors and not (run / "evaluation.json").exists()
    assert code == -number or code == 1 and errors.endswith("error: interrupted; what was saved before is untouched\n")
    resume(any_script, run)
    same_end(finished(any_script).run, run)


# ---- Another machine's clock -------------------------------------------------------------------------------------
def test_a_clock_that_is_behind_or_ahead_changes_nothing(any_script, finished, tmp_path):
    run, day = tmp_path / "run", 86_400
    third = functools.partial(strike, run / "episodes.csv", 4, signal.SIGKILL)
    assert start(any_script, tmp_path, third).wait()[0] == -9
    for hooks in ([functools.partial(set_clock, -day), third], [functools.partial(set_clock, 400 * day)]):
        Process(any_script, tmp_path, "--resume", str(run), before=hooks).wait()
    same_end(finished(any_script).run, run)
    assert scalars(finished(any_script).run) == scalars(run)
    seconds = [float(row.split(",")[1]) for row in (run / "episodes.csv").read_text().splitlines()[1:]]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < day / 2, "sittings add up"
    for tag in ("charts/episodic_return", "losses/entropy"):
        times = [event.wall_time for event in events(run).Scalars(tag)]
        assert times == sorted(times) and times[-1] - times[0] < day / 2


# ---- Refused, and nothing changed --------------------------------------------------------------------------------
def refused(script, run, message, **changes):
    before = contents(run)
    with pytest.raises(SystemExit) as exit:
        resume(script, run, **{"total_timesteps": 512} | changes)
    assert isinstance(exit.value.code, str) and re.match(f"error: .*{message}", exit.value.code), exit.value.code
    assert "\n" not in exit.value.code and contents(run) == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "incomplete", "other networks", "code", "missing"])
def test_a_damaged_checkpoint_is_refused(any_script, saved, damage, tmp_path):
    path = saved / "checkpoint.pt"
    data, state = path.read_bytes(), torch.load(path, weights_only=True)
    if damage in ("truncated", "empty", "foreign"):
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "foreign": b"{}"}[damage])
    elif damage == "missing":
        path.unlink()
    else:
        changes = {"incomplete": {"optimizer": None}, "other networks": {"follower": {"a": torch.zeros(3)}}}
        torch.save(state | changes.get(damage, {"optimizer": Malice(tmp_path / "struck")}), path)
    refused(any_script, saved, re.escape(f"{path} cannot be read"))
    assert not (tmp_path / "struck").exists()


class Malice:
    """Does something when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "a list", "unknown", "bad", "a word", "missing"])
def test_damaged_arguments_are_refused(any_script, saved, damage):
    path = saved / "args.json"
    text, record = path.read_text(), json.loads(path.read_text())
    texts = {"truncated": text[: len(text) // 2], "empty": "", "foreign": "\x00\xff", "a list": "[]"}
    changes = {"unknown": {"no_such_flag": 1}, "bad": {"gamma": 2.0}, "a word": {"num_envs": "2"}}.get(damage, {})
    path.write_text(texts.get(damage, json.dumps(record | {"arguments": record["arguments"] | changes})))
    if damage == "missing":
        path.unlink()
    with pytest.raises(SystemExit, match=f"error: {re.escape(str(saved))} is not the folder of a run .*damaged"):
        any_script.main(any_script.Args(resume=str(saved), **small(any_script)))


def test_changed_flags_are_refused_by_name(any_script, saved):
    refused(any_script, saved, "was trained with --gamma 0.99, not 0.9; leave it out", gamma=0.9)
    refused(any_script, saved, "was trained with --seed 1, not 7", seed=7)
    refused(any_script, saved, "has taken 384 steps already", total_timesteps=128)
    with pytest.raises(SystemExit, match="with --seed 1, not .*; leave it out"):
        any_script.main(any_script.Args(evaluate=str(saved), seed=7, **small(any_script)))


def command_line_refused(script, saved, monkeypatch, message, *argv):
    before = contents(saved)
    monkeypatch.setattr("sys.argv", ["script", *argv])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        script.main(script.parse_args())
    assert contents(saved) == before


def test_command_lines_that_do_not_fit_a_saved_run_are_refused(any_script, saved, monkeypatch):
    check, run = functools.partial(command_line_refused, any_script, saved, monkeypatch), str(saved)
    default = str(any_script.Args().num_envs)  # what is given is compared even at its default
    check(f"trained with --num-envs 2, not {default}; leave it out", "--resume", run, "--num-envs", default)
    check("--evaluate plays: leave out --resume", "--evaluate", run, "--resume", run)
    check("let --eval-episodes be at least 1", "--evaluate", run, "--eval-episodes", "0")


@pytest.mark.parametrize(("name", "twin"), [*permutations(TWINS), *permutations(CONTINUOUS)])
def test_a_run_of_the_twin_is_refused(name, twin, finished):
    refused(SCRIPTS[name], finished(SCRIPTS[twin]).run, f"that is a run of {twin}.py")


# ---- Faults of the machine and of the numbers --------------------------------------------------------------------
def test_a_disk_that_takes_no_more_ends_a_run_with_one_line(any_script, finished, tmp_path):
    """By a limit on a file's size: the second checkpoint, with Adam's moments, is three times as large as the first."""
    run, size = tmp_path / "run", 2 * (finished(any_script).run / "model.pt").stat().st_size
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    code, output, errors = start(any_script, tmp_path, limit).wait()
    assert code == 1 and not output and "Traceback" not in errors, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]  # beside the progress
    assert re.match("error: .* cannot be written: File too large; what was saved before is untouched$", line), line
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 0
    resume(any_script, run)
    same_end(finished(any_script).run, run)


def test_a_run_that_diverges_names_step_and_checkpoint_and_saves_no_broken_agent(any_script, tmp_path, monkeypatch):
    """In the third rollout the step size is such that the second of two gradient steps meets what is not finite."""
    run, real, calls = tmp_path / "run", any_script.update, []

    def update(leader, follower, optimizer, batch, args):
        calls.append(len(calls))
        for group in optimizer.param_groups:
            group["lr"] = 1e30 if len(calls) == 3 else group["lr"]
        return real(leader, follower, optimizer, batch, args)

    monkeypatch.setattr(any_script, "update", update)
    with pytest.raises(SystemExit) as exit:
        any_script.main(any_script.Args(run_dir=str(run), **small(any_script)))
    said = r"error: after step 128: \S+ is not finite; the checkpoint of step 128 in .*run is good$"
    assert re.match(said, exit.value.code)
    assert all(x.isfinite().all() for x in weights(run / "checkpoint.pt").values()) and not (run / "model.pt").exists()
    monkeypatch.undo()
    resume(any_script, run)  # good indeed
    assert (run / "model.pt").exists()
