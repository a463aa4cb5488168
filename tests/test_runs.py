"""Whole runs of `main`: they leave what they promise, repeat themselves, learn, and refuse bad input."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ATARI,
    FORKS,
    ROOT,
    SCRIPTS,
    VECTORS,
    Process,
    games,
    recorded,
    same,
    same_end,
    small,
    weights,
    words,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LOSSES = "policy_loss value_loss entropy approx_kl clipfrac explained_variance"
CLEANRL = {f"losses/{name}" for name in LOSSES.split()}
CLEANRL |= {f"charts/{name}" for name in ("episodic_return", "episodic_length", "SPS", "learning_rate")}


def events(run):
    loaded = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    loaded.Reload()
    return loaded


def scalars(run):
    """Tag -> [(step, value)], without the one that measures time."""
    loaded = events(run)
    tags = set(loaded.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(e.step, e.value) for e in loaded.Scalars(tag)] for tag in tags}


# ---- What a run leaves -------------------------------------------------------------------------------------------
def test_a_run_leaves_what_it_promises(any_script, finished):
    run, args = finished(any_script).run, finished(any_script).args
    left = {path.name for path in run.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert left == {"args.json", "episodes.csv", "checkpoint.pt", "model.pt", "evaluation.json"}
    record = json.loads((run / "args.json").read_text())
    assert record["script"] == f"{any_script.__name__}.py" and record["arguments"] == dataclasses.asdict(args)
    assert record["protocol"] == any_script.env_protocol(args) and record["protocol"]["env_id"] == args.env_id
    text = (ROOT / record["script"]).read_bytes()
    assert record["versions"]["script"] == hashlib.sha256(text).hexdigest()
    assert record["versions"]["torch"] == torch.__version__ and "gymnasium" in record["versions"]
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == args.total_timesteps
    assert same(run / "checkpoint.pt", run / "model.pt")
    assert json.loads((run / "evaluation.json").read_text()) == finished(any_script).evaluation


def test_episodes_csv_has_a_row_for_each_whole_game(any_script, finished):
    truth = finished(any_script).games
    recorded = [(steps, pytest.approx(score), length) for steps, score, length in truth]
    assert len(truth) >= 12 and games(finished(any_script).run) == recorded


def test_tensorboard_shows_the_same_under_cleanrls_tags(any_script, finished):
    run, args = finished(any_script).run, finished(any_script).args
    logged, rollout = scalars(run), args.num_envs * args.num_steps
    assert CLEANRL <= set(events(run).Tags()["scalars"])
    steps, returns, lengths = zip(*games(run))
    assert logged["charts/episodic_return"] == [(a, pytest.approx(b)) for a, b in zip(steps, returns)]
    assert logged["charts/episodic_length"] == list(zip(steps, lengths))
    assert [step for step, _ in logged["losses/entropy"]] == list(range(rollout, args.total_timesteps + 1, rollout))
    if hasattr(any_script, "leader_loss"):
        tags = {tag for tag in logged if tag.startswith("leader/")}
        assert {"leader/utility", "leader/perception_cost", "leader/grad_norm"} <= tags
        if any_script.__name__ not in FORKS:  # they may attend otherwise
            assert {"leader/blocks.0.gate", "leader/attention_entropy_1"} <= tags
        images = events(run).Images("leader/attention")
        assert [image.step for image in images] == [rollout, args.total_timesteps], "at the beginning and at the end"


def test_the_learning_rate_falls_if_asked_to(any_script, tmp_path):
    settings = small(any_script, anneal_lr=True, learning_rate=1e-3, eval_episodes=0)
    assert any_script.main(any_script.Args(run_dir=str(tmp_path / "run"), **settings)) == {}
    rates = [value for _, value in scalars(tmp_path / "run")["charts/learning_rate"]]
    assert rates == pytest.approx([1e-3 * (6 - k) / 6 for k in range(6)])
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize("name", ATARI)
def test_an_atari_run_records_how_the_game_is_played(name, tmp_path):
    script, run = ATARI[name], tmp_path / "run"
    settings = {"env_id": "ALE/Breakout-v5", "total_timesteps": 64, "max_episode_steps": 60}
    evaluation = script.main(script.Args(run_dir=str(run), **small(script, **settings)))
    emulator = json.loads((run / "args.json").read_text())["protocol"]["emulator"]
    assert emulator["repeat_action_probability"] == 0.25 and emulator["max_num_frames_per_episode"] == 240
    assert evaluation["lengths"] == [60, 60] and evaluation["protocol"]["emulator"] == emulator


# ---- Repeatable --------------------------------------------------------------------------------------------------
def test_the_same_seed_ends_alike_and_another_does_not(any_script, finished, tmp_path):
    for name, seed in (("same", 1), ("other", 2)):
        any_script.main(any_script.Args(run_dir=str(tmp_path / name), seed=seed, **small(any_script)))
    whole = finished(any_script).run
    same_end(whole, tmp_path / "same")
    assert scalars(whole) == scalars(tmp_path / "same")
    assert games(whole) != games(tmp_path / "other") and not same(whole / "model.pt", tmp_path / "other" / "model.pt")


def test_a_task_that_draws_from_global_generators_repeats_itself_and_is_resumed_exactly(any_script, tmp_path):
    task = "MinAtar/Dice-v1" if any_script.__name__ in ATARI else "Dice-v0"
    runs = [tmp_path / name for name in "abc"]
    for run in runs[:2]:
        any_script.main(any_script.Args(run_dir=str(run), **small(any_script, env_id=task)))
    args = any_script.Args(run_dir=str(runs[2]), **small(any_script, env_id=task, total_timesteps=256))
    any_script.main(args)
    any_script.main(dataclasses.replace(args, resume=str(runs[2]), total_timesteps=384))
    same_end(runs[0], runs[1])
    same_end(runs[0], runs[2])


# ---- Evaluation --------------------------------------------------------------------------------------------------
def test_an_evaluation_repeats_itself_and_counts_the_first_game_of_each_environment(any_script):
    task = "MinAtar/Dice-v1" if any_script.__name__ in ATARI else "Dice-v0"
    args = any_script.Args(**small(any_script, env_id=task, eval_episodes=6, max_episode_steps=100))
    leader, follower = any_script.make_agent(args, "cpu")
    first = any_script.evaluate(leader, follower, args)
    with recorded() as account:
        assert any_script.evaluate(leader, follower, args) == first
    played = [env for env in account.envs if env.steps]
    assert list(zip(first["returns"], first["lengths"])) == [env.games[0] for env in played]
    assert len(set(first["lengths"])) > 2, "games of several lengths, or the first to end could be counted unnoticed"
    assert first["mean"] == pytest.approx(sum(first["returns"]) / 6)
    if any_script.__name__ in VECTORS:
        assert all(env.steps == env.games[0][1] for env in played), "a game that is over idles"


def test_a_greedy_evaluation_takes_the_most_probable_action(any_script):
    args = any_script.Args(**small(any_script))
    leader, follower = any_script.make_agent(args, "cpu")
    for parameter in follower.parameters():
        torch.nn.init.zeros_(parameter)  # all actions equally probable, or a standard normal
    for greedy in (False, True):
        with recorded() as account:
            result = any_script.evaluate(leader, follower, dataclasses.replace(args, eval_greedy=greedy))
        assert result["greedy"] is greedy and (account.actions == {0}) is greedy


def test_an_evaluation_in_a_new_process_repeats_that_after_training(any_script, finished, tmp_path):
    run = shutil.copytree(finished(any_script).run, tmp_path / "moved here")
    (run / "evaluation.json").unlink()
    code, output, errors = Process(any_script, tmp_path, "--evaluate", str(run)).wait()
    assert code == 0 and "evaluation over 2 games" in output, errors
    same_end(finished(any_script).run, run)


@pytest.mark.parametrize("removed", ["model.pt", "checkpoint.pt"])
def test_a_loaded_agent_is_the_trained_one(any_script, finished, tmp_path, removed):
    run = shutil.copytree(finished(any_script).run, tmp_path / "run")
    (run / removed).unlink()
    args, leader, follower = any_script.load_agent(run)
    assert args == finished(any_script).args
    loaded = {f"leader.{name}": x for name, x in leader.state_dict().items()}
    loaded |= {f"follower.{name}": x for name, x in follower.state_dict().items()}
    trained = weights(finished(any_script).run / "model.pt")
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert any_script.evaluate(leader, follower, args) == finished(any_script).evaluation


# ---- Learning ----------------------------------------------------------------------------------------------------
@pytest.mark.learning
def test_learns_where_things_are(any_script, tmp_path):
    """Chance earns 0.25 a step, the optimum 1."""
    task = "MinAtar/Dice-v1" if any_script.__name__ in ATARI else "Dice-v0"
    settings = {"total_timesteps": 2048, "num_envs": 4, "update_epochs": 4, "learning_rate": 1e-3, "gamma": 0.5}
    settings |= {"eval_episodes": 20, "checkpoint_interval": 0, "max_episode_steps": 100}
    run = str(tmp_path / "run")
    evaluation = any_script.main(any_script.Args(run_dir=run, **small(any_script, env_id=task, **settings)))
    assert sum(evaluation["returns"]) / sum(evaluation["lengths"]) > 0.6


# ---- Streams -----------------------------------------------------------------------------------------------------
STREAMS = {"all closed": "<&- >&- 2>&-", "no stderr": "2>&-", "no reader": "| true", "ascii": ""}
EACH = [(case, name) for i, case in enumerate(STREAMS) for j, name in enumerate(SCRIPTS) if name in FORKS or i == j]


@pytest.mark.parametrize(("case", "name"), EACH)
def test_streams_that_are_closed_or_narrow_end_no_run(case, name, tmp_path):
    """A script for each, to save time: the lines concerned are the same in all."""
    run, settings = tmp_path / "run", small(SCRIPTS[name], run_dir="run", total_timesteps=128)
    encoding = {"PYTHONIOENCODING": "ascii"} if case == "ascii" else {}
    for flags in (words(**settings), ["--help"]):
        command = " ".join([sys.executable, f"{ROOT}/{name}.py", *flags])
        result = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} {STREAMS[case]}"],
            cwd=tmp_path, env=os.environ | encoding, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        if case == "ascii":
            assert ("evaluation over 2 games" in result.stdout) == (flags != ["--help"])
    assert json.loads((run / "evaluation.json").read_text())["returns"] and json.loads((run / "args.json").read_text())
    assert len(scalars(run)["losses/entropy"]) == 2 and games(run)
    assert os.listdir(tmp_path) == ["run"]
    for path in run.iterdir():
        assert b"of 128 steps" not in path.read_bytes() and b"evaluation over" not in path.read_bytes(), path


def test_a_log_file_gets_a_line_a_minute(any_script, tmp_path, monkeypatch, capsys):
    now = [0.0]

    def clock():  # each look at it takes five seconds
        now[0] += 5
        return now[0]

    monkeypatch.setattr(time, "monotonic", clock)
    settings = small(any_script, num_steps=16, total_timesteps=32 * 40, eval_episodes=0, checkpoint_interval=0)
    any_script.main(any_script.Args(run_dir=str(tmp_path / "run"), **settings))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 20 < 40 and all("of 1,280 steps" in line and line.count("/s,") == 1 for line in lines), lines
    assert now[0] / 60 - 1 <= len(lines) <= now[0] / 60 + 2
    assert lines[-1].startswith("[####################] 1,280 of")


def test_a_terminal_shows_a_bar(any_script, tmp_path):
    reader, terminal = os.openpty()
    run = Process(any_script, tmp_path, *words(run_dir=tmp_path / "run", **small(any_script)), terminal=terminal)
    assert run.wait()[0] == 0
    text = os.read(reader, 2**16).decode()
    bars = re.findall(r"\r(\[[# ]{20}\][^\r]*)", text)
    assert len(bars) == 6 and bars[-1].startswith("[####################] 384 of 384 steps, ") and text.endswith("\n")
    assert all(len(re.findall(r"\d/s\b", bar)) == 1 and len(bar) < 100 for bar in bars), bars


def test_help_is_in_groups_and_80_columns_wide(any_script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{any_script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        any_script.parse_args()
    text = capsys.readouterr().out
    assert exit.value.code == 0 and max(map(len, text.splitlines())) <= 80, max(text.splitlines(), key=len)
    groups = ["run", "environment", "ppo"] + ["sprig"] * hasattr(any_script, "leader_loss")
    titles = re.findall(r"(\w+) options", text)
    assert titles[: len(groups)] == groups and (any_script.__name__ in FORKS or len(titles) == len(groups))
    for name in vars(any_script.Args()):
        assert f"--{name.replace('_', '-')}" in text


# ---- Bad input ---------------------------------------------------------------------------------------------------
BAD = {
    "no environments": ({"num_envs": 0}, "--num-envs must be in [1, 1e+12], not 0"),
    "negative seed": ({"seed": -1}, "--seed must be in [0, "),
    "nan": ({"learning_rate": "nan"}, "--learning-rate must be"),
    "infinite": ({"vf_coef": "inf"}, "--vf-coef must be in [0, 1e+30], not inf"),
    "gamma": ({"gamma": 1.5}, "--gamma must be in [0, 1], not 1.5"),
    "kl": ({"target_kl": "nan"}, "--target-kl must be"),
    "too short": ({"total_timesteps": 63}, "--total-timesteps 63 is less than one rollout of 64 steps"),
    "indivisible": ({"minibatch_size": 48}, "--minibatch-size 48 does not divide the rollout of 64 steps"),
    "one transition": ({"minibatch_size": 1}, "--minibatch-size must be in [2, "),
    "no such device": ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
    "nonsense device": ({"device": "abacus"}, "--device abacus cannot be used"),
    "no computer": ({"device": "meta"}, "--device meta cannot be used"),
    "no wandb": ({"track": True}, "pip install wandb"),
    "taken folder": ({"run_dir": "taken"}, "--run-dir taken is not empty"),
    "folder is a file": ({"run_dir": "taken/precious"}, "--run-dir taken/precious is not"),
    "folder in a file": ({"run_dir": "taken/precious/run"}, "taken/precious/run cannot be written: Not a directory"),
    "folder not to be written": ({"run_dir": "/proc/run"}, "/proc/run cannot be written"),
    "evaluates nothing": ({"evaluate": "taken"}, "taken is not the folder of a run"),
    "resumes nothing": ({"resume": "nowhere"}, "nowhere is not the folder of a run"),
    "no name": ({"resume": ""}, "is not the folder of a run"),
}
BAD_PIXELS = {
    "misspelt": ({"env_id": "BeamRidrNoFrameskip-v4"}, "take e.g. BeamRiderNoFrameskip-v4"),
    "random skip": ({"env_id": "BeamRider-v4"}, "take e.g. ALE/BeamRider-v5"),
    "memory": ({"env_id": "ALE/Breakout-ram-v5"}, "take e.g. ALE/Breakout-v5"),
    "vectors": ({"env_id": "HalfCheetah-v5"}, "(vectors: sprig_continuous.py)"),
}
BAD_VECTORS = {
    "planes": ({"env_id": "MinAtar/Breakout-v1"}, "_atari"),
    "a grid": ({"env_id": "Taxi-v4"}, "Taxi-v4 shows Discrete(500), not a vector"),
}
BAD_SPRIG = {
    "alpha": ({"cooperation_weight": 1.1}, "--cooperation-weight must be in [0, 1]"),
    "literal": ({"paper_literal": True, "perception_cost": "concentration"}, "--paper-literal sets --perception-cost"),
    "nobody leads": ({"leader_gradient": "unrolled", "update": "joint"}, "unrolled needs --update stackelberg"),
}


def cases():
    for name, script in SCRIPTS.items():
        bad = BAD | (BAD_PIXELS if name in ATARI else BAD_VECTORS)
        for case in bad | (BAD_SPRIG if hasattr(script, "leader_loss") else {}):
            yield pytest.param(script, case, id=f"{name}-{case}")


def bad_run(script, argv, folder, monkeypatch):
    """Returns what the script exits with, having written nothing."""
    (folder / "taken").mkdir()
    (folder / "taken" / "precious").write_text("a result")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
    with pytest.raises(SystemExit) as exit:
        script.main(script.parse_args())
    assert sorted(map(str, folder.rglob("*"))) == [f"{folder}/taken", f"{folder}/taken/precious"]
    assert (folder / "taken" / "precious").read_text() == "a result"
    return exit.value.code


@pytest.mark.parametrize(("script", "case"), cases())
def test_bad_input_is_one_clear_line(script, case, tmp_path, monkeypatch):
    changes, message = (BAD | BAD_PIXELS | BAD_VECTORS | BAD_SPRIG)[case]
    line = bad_run(script, words(**small(script, **changes)), tmp_path, monkeypatch)
    assert isinstance(line, str) and line.startswith("error: ") and message in line and "\n" not in line


@pytest.mark.parametrize("argv", [["--num-envs", "two"], ["--norm-adv", "all"], ["--gama", "0.9"]], ids=" ".join)
def test_a_flag_that_cannot_be_read_is_named(any_script, argv, tmp_path, monkeypatch, capsys):
    assert bad_run(any_script, argv, tmp_path, monkeypatch) == 2
    assert argv[0] in capsys.readouterr().err


def test_a_mistake_on_the_command_line_exits_without_a_traceback(any_script, tmp_path):
    code, output, errors = Process(any_script, tmp_path, "--env-id", "Chess-v1").wait()
    assert code == 1 and not output and errors.startswith("error: --env-id Chess-v1") and errors.count("\n") == 1
