"""Real, tiny matrices: what benchmark/run.py leaves, skips, goes on with after an interruption, and refuses."""

import csv
import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import cleanrl
import collect
import gymnasium as gym
import numpy as np
import plot
import pytest
import run as runner
import speed
import torch
from conftest import ROOT

import watch

MATRICES = sorted((ROOT / "benchmark" / "matrices").glob("*.toml"))
TINY = """
question = "Does it run?"
tasks = ["CartPole-v1"]
seeds = [1]
[flags]
total-timesteps = 256
checkpoint-interval = 32
eval-episodes = 2
num-steps = 32
minibatch-size = 32
update-epochs = 1
max-episode-steps = 20
[arms.ppo]
title = "PPO"
script = "ppo_continuous_baseline.py"
"""
SPRIG = """
[arms.sprig]
title = "SPRIG"
script = "sprig_continuous.py"
flags = { perception-cost-weight = 0.5 }
"""
DIVERGING = """
[arms.diverging]
title = "a step size that no network survives"
script = "ppo_continuous_baseline.py"
flags = { learning-rate = 1e30 }
"""
LONG = {  # a checkpoint after each iteration, as the one that SIGTERM adds restarts the games as well
    "total-timesteps = 256": "total-timesteps = 8192",
    "checkpoint-interval = 32": "checkpoint-interval = 256",
    "num-steps = 32": "num-steps = 256",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_matrix(text=TINY, name="tiny", changes=()):
    for old, new in dict(changes).items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = runner.Path(f"{name}.toml")
    path.write_text(text)
    return path


def start(matrix, *flags):
    command = [sys.executable, ROOT / "benchmark" / "run.py", matrix, "--results", "results", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def play(matrix, *flags):
    """(exit code, what it says) of run.py in a process of its own, which loads Ray."""
    process = start(matrix, *flags)
    output, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    return process.returncode, output + errors


def play_only(matrix, index=0):
    """One run of a matrix, watched by this process."""
    runner.main(runner.Args(matrix, only=index, results=runner.Path("results")))


def rows(path):
    """The games of a result, without the seconds."""
    with gzip.open(path, "rt", newline="") as file:
        return [(row["agent_steps"], row["episodic_return"], row["episodic_length"]) for row in csv.DictReader(file)]


def processes_of(folder):
    """Ids of the scripts that train in the folder."""
    found = []
    for path in runner.Path("/proc").glob("[0-9]*"):
        try:
            words, cwd = (path / "cmdline").read_text(), os.readlink(path / "cwd")
        except OSError:
            continue
        if cwd == str(folder) and "_baseline.py" in words:
            found.append(int(path.name))
    return found


def wait_for(condition, process=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_a_matrix_is_played_exported_and_then_skipped_and_what_fails_is_tried_twice(folder):
    matrix = write_matrix(TINY + SPRIG + DIVERGING)
    code, said = play(matrix)
    assert code == 1, said
    log = folder / "runs" / "tiny" / "CartPole-v1__diverging__1.log"
    reason = "is not finite; the last good checkpoint is"
    assert said.count(reason) == 3, "each attempt, and the list at the end"
    assert said.count("; trying once more") == 1 and log.read_text().count(reason) == 2
    assert said.splitlines()[-1].startswith("failed: [2] CartPole-v1 diverging seed 1: exit code 1: error: iteration")
    for arm, weight in (("ppo", None), ("sprig", 0.5)):
        result = folder / "results" / "tiny" / "CartPole-v1" / f"{arm}_seed1.json"
        record = json.loads(result.read_text())
        keys = ["script", "arguments", "protocol", "versions", "hardware", "trained_steps", "evaluation"]
        assert list(record) == keys and list(record["hardware"]) == ["cpu", "cores", "gpu"]
        assert record["arguments"]["run_dir"] == "" and record["arguments"]["threads"] == 1
        assert record["arguments"].get("perception_cost_weight") == weight
        assert record["trained_steps"] == 256 and len(record["evaluation"]["returns"]) == 2
        packed = result.with_suffix(".csv.gz").read_bytes()
        assert packed[3:8] == bytes(5), "neither a file name nor a time in gzip's header"
        lines = gzip.decompress(packed).decode().splitlines()
        assert lines[0] == "agent_steps,seconds,episodic_return,episodic_length"
        steps = [int(step) for step, _, _ in rows(result.with_suffix(".csv.gz"))]
        assert len(steps) > 8 and steps == sorted(steps) and steps[-1] <= 256
        run = folder / "runs" / "tiny" / f"CartPole-v1__{arm}__1"
        collect.main(collect.Args([run], "by-hand", arm, folder / "results"))
        again = folder / "results" / "by-hand" / "CartPole-v1" / result.name
        assert again.with_suffix(".csv.gz").read_bytes() == packed and again.read_text() == result.read_text()
        with pytest.raises(SystemExit, match="is there already"):
            collect.main(collect.Args([run], "by-hand", arm, folder / "results"))
    matrix = write_matrix(TINY + SPRIG)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, said = play(matrix)
    assert code == 0 and said == "tiny.toml: 2 runs, 2 done or left alone, 0 to play\n"
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_interrupted_and_killed_runs_end_like_one_left_alone(folder):
    alone = write_matrix(name="alone", changes=LONG)
    play_only(alone)
    matrix = write_matrix(changes=LONG)
    run = folder / "runs" / "tiny" / "CartPole-v1__ppo__1"
    process = start(matrix)
    wait_for((run / "checkpoint-256.pt").exists, process)
    for pid in processes_of(folder):  # the script alone: its second attempt goes on
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "resumed" in (run / "args.json").read_text(), process)
    newest = runner.load_script("ppo_continuous_baseline.py").checkpoint_paths(run)[0]
    wait_for(lambda: not newest.exists(), process)  # it is two checkpoints further
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "exit code -9" in output and "goes on on" in output and "the same command goes on" in output
    assert not processes_of(folder), "nobody trains on"
    assert "continue with: " in run.with_suffix(".log").read_text(), "it was given the time to save"
    (planned,) = runner.load_matrix(matrix, runner.Path("runs"), runner.Path("results"))
    state, step = runner.find_state(planned)
    assert state == f"interrupted at {step}" and 512 < step < 8192
    play_only(matrix)
    ours, whole = (folder / "results" / name / "CartPole-v1" / "ppo_seed1.json" for name in ("tiny", "alone"))
    assert rows(ours.with_suffix(".csv.gz")) == rows(whole.with_suffix(".csv.gz"))
    assert len(rows(ours.with_suffix(".csv.gz"))) > 100
    ours, whole = (json.loads(path.read_text()) for path in (ours, whole))
    assert ours["evaluation"] == whole["evaluation"] and len(ours["resumed"]) == 2


def test_a_script_outlives_neither_its_watcher_nor_its_lock(folder, capsys):
    matrix = write_matrix(changes={**LONG, "total-timesteps = 256": "total-timesteps = 1_000_000"})
    process = start(matrix, "--only", "0")
    run = folder / "runs" / "tiny" / "CartPole-v1__ppo__1"
    wait_for((run / "checkpoint-256.pt").exists, process)
    play_only(matrix)
    assert "another process plays it, left alone" in capsys.readouterr().out
    process.kill()
    process.communicate()
    (planned,) = runner.load_matrix(matrix, runner.Path("runs"), runner.Path("results"))
    wait_for(lambda: not runner.is_played(planned))
    assert not processes_of(folder)
    assert runner.find_state(planned)[0].startswith("interrupted at")


def test_dry_run_only_and_states(folder, capsys):
    matrix = write_matrix(changes={"seeds = [1]": "seeds = [1, 2, 3]"})

    def table():
        capsys.readouterr()
        runner.main(runner.Args(matrix, dry_run=True, results=runner.Path("results")))
        return [line.split("  ") for line in capsys.readouterr().out.splitlines()]

    def states():
        return [[cell.strip() for cell in line if cell][4] for line in table()[1:]]

    lines = table()
    assert len(lines) == 4 and not (folder / "runs").exists()
    command = lines[2][-1].split()
    assert "--seed 2 " in lines[2][-1] and "--threads 1 " in lines[2][-1]
    play_only(matrix, index=0)
    assert states() == ["done", "to do", "to do"]
    subprocess.run(command, check=True, capture_output=True)  # just as it is printed
    assert states() == ["done", "played, to export", "to do"]
    play_only(matrix, index=1)
    assert "seed 2: starts" not in capsys.readouterr().out, "it is exported, not played again"
    unusable = folder / "runs" / "tiny" / "CartPole-v1__ppo__3"
    unusable.mkdir()
    (unusable / "checkpoint-64.pt").write_text("not a checkpoint")
    assert states() == ["done", "done", "to do, what is there set aside"]
    play_only(matrix, index=2)
    assert states() == ["done", "done", "done"]
    assert (unusable.with_name(f"{unusable.name}__aside1") / "checkpoint-64.pt").exists()
    (run,) = runner.load_matrix(write_matrix(name="other"), runner.Path("runs"), runner.Path("results"))
    run.folder.mkdir(parents=True)
    shutil.copy(unusable / "args.json", run.folder)
    state = torch.load(unusable / "checkpoint-256.pt", weights_only=True)
    state["progress"]["global_step"] = 0  # as of a script that fails in its first rollout
    torch.save(state, run.folder / "checkpoint-0.pt")
    assert runner.find_state(run) == ("to do, what is there set aside", None)
    matrix = write_matrix(changes={"seeds = [1]": "seeds = [1, 2, 3]", "steps = 20": "steps = 19"})
    result = "results/tiny/CartPole-v1/ppo_seed1.json"
    assert states()[0] == f"differs: {result} was made with --max-episode-steps 20, not 19"
    with pytest.raises(SystemExit, match=f"error: {result} was made with --max-episode-steps 20, not 19; move it away"):
        runner.main(runner.Args(matrix, results=runner.Path("results")))
    matrix = write_matrix(changes={"seeds = [1]": "seeds = [1, 2, 3]"})
    record = json.loads(runner.Path(result).read_text())
    assert states()[0] == "done" and "ent_coef" not in matrix.read_text()
    record["arguments"]["ent_coef"] = 0.5  # as if another default had been in force
    runner.Path(result).write_text(json.dumps(record))
    assert states()[0] == f"differs: {result} was made with --ent-coef 0.5, not 0.0"
    matrix = write_matrix(changes={"seeds = [1]": "seeds = [1, 2, 3]", "steps = 20": "steps = 19"})
    shutil.rmtree("results")
    with pytest.raises(SystemExit, match="ppo__1/args.json was made with --max-episode-steps 20, not 19"):
        play_only(matrix)
    with pytest.raises(SystemExit, match="--only 3: tiny.toml has runs 0 to 2"):
        play_only(matrix, index=3)


def test_an_arm_can_be_the_beginning_of_another_matrix_and_is_what_a_shorter_run_would_have_been(folder, capsys):
    constant = {"num-steps = 32": "num-steps = 32\nanneal-lr = false"}
    write_matrix(name="longer", changes=constant | {"total-timesteps = 256": "total-timesteps = 512"})
    matrix = write_matrix(TINY + 'beginning_of = "longer"\n', changes=constant)

    def state():
        (run,) = runner.load_matrix(matrix, runner.Path("runs"), runner.Path("results"))
        return runner.find_state(run)[0]

    assert state() == "left to longer"
    play_only(matrix)
    assert "[0] CartPole-v1 ppo seed 1: left to longer, which has not played it yet" in capsys.readouterr().out
    assert not (folder / "runs").exists()
    play_only(runner.Path("longer.toml"))
    assert state() == "done"
    play_only(write_matrix(name="alone", changes=constant))
    (folder / "results" / "tiny").mkdir()
    tiny, alone = (plot.read_matrix(runner.Path(f"{name}.toml")) for name in ("tiny", "alone"))
    (begun,), (short,) = (
        plot.read_runs(folder / "results" / matrix.name, matrix)[0]["CartPole-v1"][256, "ppo"]
        for matrix in (tiny, alone)
    )
    assert begun.games[:, [0, 2]].tolist() == short.games[:, [0, 2]].tolist() and len(short.games) > 5
    assert begun.evaluation is None and short.evaluation is not None
    matrix = write_matrix(TINY + 'beginning_of = "alone"\n', changes=constant | {"steps = 256": "steps = 512"})
    assert state() == "differs: results/alone/CartPole-v1/ppo_seed1.json has 256 agent steps, fewer than 512"


def test_a_fork_is_played_and_watched_like_the_scripts(folder, monkeypatch):
    """A copy under another name, here with another default."""
    text = (ROOT / "sprig_continuous.py").read_text()
    changed = "clip_coef: float = 0.2"
    assert text.count(changed) == 1
    (folder / "my_sprig.py").write_text(text.replace(changed, "clip_coef: float = 0.3"))
    monkeypatch.setattr(runner, "ROOT", folder)
    monkeypatch.setattr(watch, "ROOT", folder)
    monkeypatch.syspath_prepend(folder)
    play_only(write_matrix(changes={"[arms.ppo]": "[arms.mine]", "ppo_continuous_baseline.py": "my_sprig.py"}))
    record = json.loads((folder / "results" / "tiny" / "CartPole-v1" / "mine_seed1.json").read_text())
    assert (record["script"], record["arguments"]["clip_coef"]) == ("my_sprig.py", 0.3)
    script, args, leader, *_, envs = watch.load_run(folder / "runs" / "tiny" / "CartPole-v1__mine__1")
    envs.close()
    assert (script.__name__, args.clip_coef) == ("my_sprig", 0.3) and leader.gates()
    (folder / "broken.py").write_text("import there_is_no_such_module")
    with pytest.raises(SystemExit, match="'broken.py' cannot be imported: ModuleNotFoundError"):
        runner.check_script("broken.py", "here")


BAD = {
    "unknown key": ({"tasks =": "games ="}, "games is not a key"),
    "missing key": ({"seeds = [1]": ""}, "seeds is missing"),
    "key of an arm": ({'title = "PPO"': 'name = "PPO"'}, "arms.ppo: name is not a key"),
    "not TOML": ({"seeds = [1]": "seeds = [1"}, "is not TOML"),
    "unknown script": ({"ppo_continuous_baseline.py": "ppo.py"}, "there is no script 'ppo.py' in"),
    "no script of that kind": ({"ppo_continuous_baseline.py": "watch.py"}, "script 'watch.py' has no check_args"),
    "script elsewhere": ({"ppo_continuous_baseline.py": "benchmark/run.py"}, "'benchmark/run.py' is no name for one"),
    "unknown flag": ({"num-steps": "num-step"}, "has no flag --num-step; did you mean num-steps?"),
    "underscore": ({"num-steps": "num_steps"}, "has no flag --num_steps; did you mean num-steps?"),
    "flag of the twin": ({"num-steps = 32": "num-steps = 32\nattention = 'none'"}, "has no flag --attention"),
    "flag of the runner": ({"num-steps = 32": "num-steps = 32\nseed = 3"}, "--seed is not for the matrix"),
    "peer": ({"[arms.ppo]": "[peers]\nppo = 'P'\n[arms.ppo]"}, "peers has ppo = 'P', but takes a label"),
    "label": ({"[arms.ppo]": "[arms.PPO_1]"}, "arms.PPO_1: a label consists of"),
    "no arms": ({'[arms.ppo]\ntitle = "PPO"\nscript = "ppo_continuous_baseline.py"\n': "[arms]\n"}, "arms is empty"),
    "arm that is no table": ({"[arms.ppo]": "[arms]"}, "is not a table"),
    "saturated": (
        {"seeds = [1]": "seeds = [1]\nsaturated = [['Pong']]"},
        "saturated has ['Pong'], which is not one of",
    ),
    "double seed": ({"seeds = [1]": "seeds = [1, 2, 1]"}, "seeds has 1 twice"),
    "no seeds": ({"seeds = [1]": "seeds = []"}, "is not a list of int, at least one"),
    "seed that is a word": ({"seeds = [1]": "seeds = ['1']"}, "is not a list of int"),
    "string for int": ({"num-steps = 32": "num-steps = '32'"}, "num-steps = '32', but --num-steps takes int"),
    "float for int": ({"num-steps = 32": "num-steps = 32.0"}, "num-steps = 32.0, but --num-steps takes int"),
    "int for bool": ({"num-steps = 32": "num-steps = 32\nanneal-lr = 1"}, "anneal-lr = 1, but --anneal-lr takes bool"),
    "choice": ({"num-steps = 32": "num-steps = 32\nnorm-adv = 'all'"}, "takes one of rollout, minibatch, none"),
    "no cores": ({"seeds = [1]": "seeds = [1]\ncpus = 0"}, "cpus must be at least 1"),
    "beginning of nothing": ({'title = "PPO"': 'title = "PPO"\nbeginning_of = "x"'}, "'x' is not the name of another"),
    "beginning of itself": (
        {'title = "PPO"': 'title = "PPO"\nbeginning_of = "tiny"'},
        "'tiny' is not the name of anot",
    ),
    "cores by the side": ({"num-steps = 32": "num-steps = 32\nthreads = 7"}, "--threads is not for the matrix"),
    "two GPUs": ({"seeds = [1]": "seeds = [1]\ngpus = 2"}, "gpus must lie in [0, 1]"),
    "hidden GPU": ({"num-steps = 32": "num-steps = 32\ndevice = 'cuda'"}, "device = 'cuda', but gpus = 0"),
    "the script's own check": ({"minibatch-size = 32": "minibatch-size = 7"}, "arms.ppo: --minibatch-size 7 does not"),
    "unknown task": ({"CartPole-v1": "CartPol-v1"}, "Did you mean: `CartPole`"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_matrix_is_said_before_anything_starts(case, folder):
    changes, message = BAD[case]
    with pytest.raises(SystemExit) as error:
        runner.main(runner.Args(write_matrix(changes=changes)))
    assert message in error.value.code and error.value.code.startswith("error: tiny.toml"), error.value.code
    assert "\n" not in error.value.code and os.listdir() == ["tiny.toml"]


def test_an_annealed_run_is_no_beginning_of_a_longer_one(folder):
    write_matrix(name="longer")
    with pytest.raises(SystemExit, match="arms.ppo: beginning_of, but with an annealed step size"):
        runner.main(runner.Args(write_matrix(changes={'title = "PPO"': 'title = "PPO"\nbeginning_of = "longer"'})))


def test_a_beginning_ends_with_a_rollout(folder):
    write_matrix(name="longer")
    with pytest.raises(SystemExit, match="total-timesteps is no multiple of a rollout, 32"):
        changes = {"total-timesteps = 256": "total-timesteps = 250\nanneal-lr = false"}
        start = TINY + 'beginning_of = "longer"\n'
        runner.load_matrix(write_matrix(start, changes=changes), runner.Path("runs"), runner.Path("results"))


def test_who_plans_needs_no_compiler(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    matrix = write_matrix(changes={"[flags]": "[flags]\ncompile = true"})
    (run,) = runner.load_matrix(matrix, runner.Path("runs"), runner.Path("results"))
    assert "--compile" in runner.command(run, None)


def test_a_command_that_has_grown_old_is_not_carried_out(folder, capsys):
    """Another process may have played the run since: then it is neither failed nor played again."""
    matrix = write_matrix()
    (run,) = runner.load_matrix(matrix, runner.Path("runs"), runner.Path("results"))
    old = [runner.command(run, None), runner.command(run, 0)]
    play_only(matrix)
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    report = runner.Report()
    for words in old:
        events = list(runner.sit(words, run.folder, run.log, os.getcwd(), run.gpus))
        assert events == [] and report.ended(run, runner.outcome(run, events)) is (words is old[0])
        assert runner.prepare(run, report) is None and not report.failures
        report.failures = {0: "once"} if words is old[0] else {}
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
    # A result that was exported before its run had ended is no result.
    record = json.loads(run.result.read_text()) | {"trained_steps": 224}
    run.result.write_text(json.dumps(record))
    assert runner.find_state(run)[0] == f"differs: {run.result} has 224 agent steps only"


def test_where_nothing_can_be_written_nothing_is_played(folder):
    (folder / "taken").touch()
    for flag in ("runs", "results"):
        with pytest.raises(SystemExit, match=f"--{flag} taken/x cannot be written: .*taken is a file"):
            runner.main(runner.Args(write_matrix(), **{flag: runner.Path("taken/x")}))
    assert sorted(os.listdir()) == ["taken", "tiny.toml"]


def test_a_run_that_cannot_be_exported_is_listed_and_stops_no_other(folder, capsys):
    matrix = write_matrix(changes={"seeds = [1]": "seeds = [1, 2]"})
    (folder / "results" / "tiny").mkdir(parents=True)
    (folder / "results" / "tiny" / "CartPole-v1").touch()  # where the task's folder should be
    runs = runner.load_matrix(matrix, runner.Path("runs"), runner.Path("results"))
    report = runner.Report()
    runner.play_here(runs, report)
    assert all("played, but not exported" in problem for problem in report.failures.values())
    assert sorted(report.failures) == [0, 1]
    (folder / "results" / "tiny" / "CartPole-v1").unlink()
    runner.play_here(runs, report)
    assert not report.failures and all(run.result.exists() for run in runs)


def test_bad_input_ends_with_one_line_and_exit_code_1(folder):
    code, said = play("missing.toml")
    assert code == 1 and said == "error: missing.toml cannot be read: No such file or directory\n"
    code, said = play(write_matrix(changes={"seeds = [1]": "seeds = [1]\ncpus = 10_000"}))
    assert code == 1 and said.splitlines()[-1] == "error: a run needs 10000 CPUs and 0 GPUs, which no machine has"
    code, said = play(write_matrix(), "--address", "127.0.0.1:1")
    assert code == 1 and said.splitlines()[-1] == "error: --address 127.0.0.1:1: [Errno 111] Connection refused"
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "--rounds 0 is less than 1"),
        ({"steps": -1}, "--steps -1 is less than 0"),
        ({"device": "abacus"}, "--device abacus is neither cpu nor cuda"),
        ({"contestant": "dqn"}, "--contestant dqn is none of"),
        ({"output": Path("/proc/x/speed.md")}, "--output /proc/x/speed.md cannot be written"),
        ({"output": Path("speed.csv")}, "--output speed.csv is not the name of a .md file"),
        ({"output": Path("/proc/speed.md")}, "--output /proc/speed.md cannot be written"),
        ({"steps": 3000}, "--steps 3000 is not a multiple of the rollout of 2048 steps"),
        ({"clock": True}, "--clock is for one script"),
        ({"clock": True, "contestant": "stable-baselines3"}, "--clock is for one script"),
        ({"clock": True, "compile": True, "contestant": "sprig_atari.py"}, "--clock cannot look into what --compile"),
        ({"contestant": "CleanRL"}, "--contestant CleanRL needs --cleanrl-clone"),
        ({"cleanrl_python": "python3"}, "--cleanrl-python would do nothing without --cleanrl-clone"),
        ({"cleanrl_clone": ROOT}, "is no clone of CleanRL: it has no cleanrl/ppo_atari.py"),
    ],
)
def test_speed_refuses_what_it_cannot_measure_before_it_measures(changes, message):
    with pytest.raises(SystemExit, match=message):
        speed.main(speed.Args(**changes))


# In the place of CleanRL's script: says what it was told, and logs 100 steps per second as a cumulative mean from the
# start of a run whose first rollout takes a second more than the others.
CLEANRL = """
import argparse, json, os, pathlib
from torch.utils.tensorboard import SummaryWriter
parser = argparse.ArgumentParser()
for name in ("total-timesteps", "num-envs", "num-steps", "num-minibatches", "update-epochs"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--env-id")
args = parser.parse_args()
told = vars(args) | {"threads": os.environ["OMP_NUM_THREADS"]}
pathlib.Path(__file__).with_name("told.json").write_text(json.dumps(told))
with SummaryWriter("runs/one") as writer:
    for step in range(2048, args.total_timesteps + 1, 2048):
        writer.add_scalar("charts/SPS", step / (1 + step / 100), step)
"""


def test_cleanrl_takes_part_on_equal_sizes(tmp_path):
    script = tmp_path / "cleanrl" / "ppo_continuous_action.py"
    script.parent.mkdir()
    script.write_text(CLEANRL)
    python = os.path.relpath(sys.executable)
    args = speed.Args("continuous", steps=4096, threads=3, contestant="CleanRL", cleanrl_clone=tmp_path)
    measured = speed.contest(speed.check(dataclasses.replace(args, cleanrl_python=python)))
    assert measured["steps per second"] == pytest.approx(100, rel=1e-5)
    assert json.loads(script.with_name("told.json").read_text()) == {
        "env_id": "HalfCheetah-v4",
        "num_envs": 1,
        "num_steps": 2048,
        "num_minibatches": 32,
        "update_epochs": 10,
        "total_timesteps": 3 * 2048,
        "threads": "3",
    }
    with pytest.raises(SystemExit, match="--cleanrl-python nowhere is not a program"):
        speed.check(dataclasses.replace(args, cleanrl_python="nowhere"))
    script.write_text("import nothing_of_that_name")
    with pytest.raises(SystemExit, match="--cleanrl-python: .* failed: ModuleNotFoundError: No module named 'nothing"):
        speed.check(args)


PEER = """
import argparse
from torch.utils.tensorboard import SummaryWriter
parser = argparse.ArgumentParser()
for flag, kind in (("--env-id", str), ("--seed", int), ("--total-timesteps", int)):
    parser.add_argument(flag, type=kind)
args = parser.parse_args()
writer = SummaryWriter(f"runs/{args.env_id}__{args.seed}")
for step in range(8, args.total_timesteps + 1, 8):
    if step % 16 == 0 and args.seed == 1:
        writer.add_scalar("charts/episodic_return", step / 2, step)
        writer.add_scalar("charts/episodic_length", 400, step)
    writer.add_scalar("charts/SPS", 100, step)
writer.close()
"""


@pytest.mark.parametrize(
    ("ours", "theirs", "task", "length"),
    [
        ("ppo_continuous_baseline.py", "ppo_continuous_action.py", "CartPole-v1", "400"),
        ("ppo_atari_baseline.py", "ppo_atari.py", "PongNoFrameskip-v4", "100"),
    ],
)
def test_what_cleanrl_plays_stands_beside_the_matrix_s_arms(folder, ours, theirs, task, length):
    changes = {"CartPole-v1": task, "ppo_continuous_baseline.py": ours, "seeds = [1]": "seeds = [1, 2]"}
    matrix = write_matrix(changes=changes | {"[arms.ppo]": "[peers]\ncleanrl = 'P'\n[arms.ppo]"})
    script = folder / "clone" / "cleanrl" / theirs
    script.parent.mkdir(parents=True)
    script.write_text(PEER)
    args = cleanrl.Args(matrix, folder / "clone", results=folder / "results")
    with pytest.raises(SystemExit, match="--tasks Qbert is not one of tiny.toml"):
        cleanrl.main(dataclasses.replace(args, tasks=("Qbert",)))
    cleanrl.main(dataclasses.replace(args, tasks=(task,), seeds=(2,)))
    first, second = (folder / "results" / "tiny" / task / f"cleanrl_seed{seed}.json" for seed in (1, 2))
    assert second.exists() and not first.exists()
    cleanrl.main(args)
    assert rows(first.with_suffix(".csv.gz"))[:2] == [("16", "8", length), ("32", "16", length)]
    assert len(rows(first.with_suffix(".csv.gz"))) == 16 and rows(second.with_suffix(".csv.gz")) == []
    record = json.loads(first.read_text())
    assert record["trained_steps"] == 256 and record["script"] == f"cleanrl/{script.name}"
    assert record["arguments"] == {"env_id": task, "seed": 1, "total_timesteps": 256}
    read = plot.read_matrix(matrix)
    runs, others = plot.read_runs(folder / "results" / "tiny", read)
    assert list(runs[task]) == [(256, "cleanrl")] and not others and read.titles["cleanrl"] == "P"
    script.unlink()
    with pytest.raises(SystemExit, match="is no clone of CleanRL"):
        cleanrl.main(args)
    script.write_text("raise SystemExit('it would be played again')")
    cleanrl.main(args)
    with pytest.raises(SystemExit, match="has no peer called cleanrl"):
        cleanrl.main(dataclasses.replace(args, matrix=write_matrix(name="other")))


def test_a_decision_is_measured_and_replaces_its_own_row_alone(tmp_path):
    path = tmp_path / "decisions.csv"
    rows = ['"PPO, Nature CNN",7,256,0.9999', '"PPO, Nature CNN",8,256,0.9999', "paper literal,7,256,0.9999"]
    path.write_text("\n".join(["variant,seed,steps,score", *rows, ""]))
    command = [sys.executable, "benchmark/decisions.py", "--output", str(path), "--threads", "1", "--steps", "256"]
    command += ["--seeds", "7", "--variants"]
    done = subprocess.run([*command, "PPO, Nature CNN"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *_, kept, literal = written = path.read_text().splitlines()
    assert [kept, literal] == rows[1:] and len(written) == 4
    score = float(written[1].removeprefix('"PPO, Nature CNN",7,256,'))
    assert 0.1 < score < 0.5  # chance is 0.25
    done = subprocess.run([*command, "paper literal", "--steps", "512"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "holds scores after 256 steps, not 512" in done.stderr
    path.write_text("variant,seed,steps,score\nanother,7,2048,0.5\n")
    done = subprocess.run([*command, "paper literal"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "is not a table of" in done.stderr and done.stderr.count("\n") == 1
    assert path.read_text() == "variant,seed,steps,score\nanother,7,2048,0.5\n"


def test_a_result_goes_nowhere_but_into_its_matrix(folder):
    for changes, message in (
        ({"arm": "b c"}, "--arm b c is not a label"),
        ({"matrix": "../x"}, "--matrix ../x is not"),
        ({"matrix": ".."}, "--matrix .. is not"),
    ):
        with pytest.raises(SystemExit, match=message):
            collect.main(collect.Args(runs=[folder], **{"matrix": "tiny", "arm": "ppo"} | changes))


def test_none_is_written_as_a_word():
    flags = {"target-kl": "None", "num-steps": 64}
    arguments = runner.script_arguments(flags, "ppo_continuous_baseline.py", "here")
    assert arguments == {"target_kl": None, "num_steps": 64}


@pytest.mark.parametrize("path", MATRICES, ids=lambda path: path.stem)
def test_committed_matrices_are_sound(path):
    runs = runner.load_matrix(path, runner.Path("runs"), runner.Path("results"))
    matrix = tomllib.loads(path.read_text())
    assert len(runs) == len(matrix["tasks"]) * len(matrix["seeds"]) * len(matrix["arms"])
    assert all(run.seed < 101 for run in runs), "from 101 on, seeds are for tuning"
    arms = [arm for arm in matrix["arms"].values()]
    assert len({(arm["script"], str(arm.get("flags"))) for arm in arms}) == len(arms), "arms differ"


@pytest.mark.parametrize("path", MATRICES, ids=lambda path: path.stem)
def test_committed_results_are_those_of_their_matrix(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = runner.load_matrix(path, runner.Path("no-such-folder"), runner.Path("benchmark/results"))
    states = [runner.find_state(run)[0] for run in runs]
    assert not [state for state in states if state.startswith("differs")]


def test_seconds_of_a_resumed_run_leave_out_the_time_between_its_sittings():
    class Point:
        def __init__(self, step, value, wall_time):
            self.step, self.value, self.wall_time = step, value, wall_time

    speed = [Point(10, 5, 100), Point(20, 5, 103), Point(30, 4, 1000), Point(40, 4, 1004)]
    assert collect.training_seconds(speed, {20}) == [2, 5, 7.5, 11.5]


def test_names_of_folders_are_such_as_any_file_system_takes():
    plan = runner.load_matrix(ROOT / "benchmark" / "matrices" / "time-limits.toml", Path("runs"), Path("results"))
    assert plan[0].task == "benchmark.time_limits:HalfCheetahLimitEnds-v4"
    assert plan[0].folder.name == "benchmark.time_limits-HalfCheetahLimitEnds-v4__ppo__1"
    assert plan[0].result.parent.name == "benchmark.time_limits-HalfCheetahLimitEnds-v4"


def test_where_limits_are_ends_they_terminate():
    env = gym.make("benchmark.time_limits:HalfCheetahLimitEnds-v4")
    env.reset(seed=0)
    steps = [env.step(np.zeros(6))[2:4] for _ in range(1000)]
    assert steps == [(False, False)] * 999 + [(True, False)]
