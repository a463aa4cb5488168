"""Real, tiny matrices: what benchmark/run.py leaves, skips, goes on with and refuses; speed.py; the studies."""

import contextlib
import csv
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import blind
import gait
import numpy as np
import probe
import pytest
import run as runner
import speed
from conftest import ROOT

import sprig_atari
import sprig_continuous

TINY = """question = "Does it run?"
tasks = ["CartPole-v1"]
seeds = [1]
[flags]
total-timesteps = 256
checkpoint-interval = 32
eval-episodes = 2
num-envs = 1
num-steps = 32
minibatch-size = 32
update-epochs = 1
max-episode-steps = 20
[arms.ppo]
title = "PPO"
script = "ppo_continuous_baseline.py"
"""
SPRIG = """[arms.sprig]
title = "SPRIG"
script = "sprig_continuous.py"
flags = { perception-cost-weight = 0.5 }
"""
DIVERGING = """[arms.diverging]
title = "a step size that no network survives"
script = "ppo_continuous_baseline.py"
flags = { learning-rate = 1e30, update-epochs = 4 }
"""
LONG = {"steps = 256": "steps = 16384", "interval = 32": "interval = 256", "num-steps = 32": "num-steps = 256"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_matrix(text=TINY, name="tiny", changes=()):
    for old, new in dict(changes).items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = Path(f"{name}.toml")
    path.write_text(text)
    return path


def start(matrix, *flags):
    """run.py in a process of its own, which loads Ray."""
    command = [sys.executable, ROOT / "benchmark" / "run.py", matrix, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    """(exit code, what it said)"""
    output, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    return process.returncode, output + errors


def play_only(matrix, index=0):
    runner.main(runner.Args(matrix, only=index))


def states(matrix, capsys):
    """Of each run, from the table that --dry-run prints."""
    capsys.readouterr()
    runner.main(runner.Args(matrix, dry_run=True))
    head, *lines = capsys.readouterr().out.splitlines()
    return [line[head.index("state") : head.index("command")].strip() for line in lines]


def games(path):
    """Of a result, without the seconds."""
    with gzip.open(path.with_suffix(".csv.gz"), "rt", newline="") as file:
        return [(row["agent_steps"], row["episodic_return"], row["episodic_length"]) for row in csv.DictReader(file)]


def scripts_in(folder):
    """Ids of the scripts that train in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(path / "cwd") == str(folder) and "_baseline.py" in (path / "cmdline").read_text():
                found.append(int(path.name))
    return found


def wait_for(condition, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_a_matrix_is_played_exported_and_then_skipped_and_what_fails_is_tried_twice(folder, capsys):
    code, said = end(start(write_matrix(TINY + DIVERGING)))
    assert code == 1, said
    log = folder / "runs" / "tiny" / "CartPole-v1__diverging__1.log"
    assert log.read_text().count("is not finite") == 2 and said.count("is not finite") == 2, "as it ends, in the list"
    assert "failed: [1] CartPole-v1 diverging seed 1: exit code 1: error: after step 0" in said.splitlines()[-1]
    result = folder / "results" / "tiny" / "CartPole-v1" / "ppo_seed1.json"
    record = json.loads(result.read_text())
    keys = {"script", "arguments", "protocol", "versions", "hardware", "trained_steps", "evaluation"}
    assert set(record) == keys and record["arguments"]["run_dir"] == ""
    assert record["trained_steps"] == 256 and len(record["evaluation"]["returns"]) == 2
    exported, own = result.with_suffix(".csv.gz"), folder / "runs/tiny/CartPole-v1__ppo__1/episodes.csv"
    assert gzip.decompress(exported.read_bytes()) == own.read_bytes()
    assert len(games(result)) > 8
    before = {path: path.stat().st_mtime_ns for path in folder.glob("r*/**/*")}
    runner.main(runner.Args(write_matrix()))
    assert capsys.readouterr().out == "tiny.toml: 1 runs, 1 done, 0 to play; logs: runs/tiny/\n"
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("r*/**/*")}


def test_interrupted_and_killed_runs_end_like_one_left_alone(folder, capsys):
    play_only(write_matrix(name="alone", changes=LONG))
    matrix = write_matrix(changes=LONG)
    (run,) = runner.plan_runs(matrix, Path("runs"), Path("results"))
    checkpoint = run.folder / "checkpoint.pt"
    process = start(matrix)
    wait_for(lambda: checkpoint.exists() and runner.saved_step(run.folder) >= 256, process)
    for pid in scripts_in(folder):  # the script alone: its second try goes on
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not scripts_in(folder), process)
    killed = runner.saved_step(run.folder)
    wait_for(lambda: runner.saved_step(run.folder) > killed, process)
    process.send_signal(signal.SIGTERM)
    code, said = end(process)
    assert code == 130 and "the same command goes on" in said and not scripts_in(folder), "nobody trains on"
    assert "go on with: " in run.log.read_text(), "it was given the time to save"
    step = runner.saved_step(run.folder)
    assert states(matrix, capsys) == [f"interrupted at step {step}"] and killed < step < 16384
    play_only(matrix)
    ours, whole = (Path(f"results/{name}/CartPole-v1/ppo_seed1.json") for name in ("tiny", "alone"))
    assert len(games(ours)) > 100 and games(ours) == games(whole)
    assert json.loads(ours.read_text())["evaluation"] == json.loads(whole.read_text())["evaluation"]


def test_a_script_outlives_neither_its_watcher_nor_its_lock(folder, capsys):
    matrix = write_matrix(changes=LONG | {"steps = 256": "steps = 1_000_000"})
    process = start(matrix, "--only", "0")
    (run,) = runner.plan_runs(matrix, Path("runs"), Path("results"))
    wait_for((run.folder / "checkpoint.pt").exists, process)
    assert states(matrix, capsys) == ["being played"]
    play_only(matrix)
    assert "another process plays it, left alone" in capsys.readouterr().out
    process.kill()
    process.communicate()
    wait_for(lambda: states(matrix, capsys)[0].startswith("interrupted at step"))
    assert not scripts_in(folder)


def test_states_printed_commands_and_refused_differences(folder, capsys):
    three = {"seeds = [1]": "seeds = [1, 2, 3]"}
    matrix = write_matrix(changes=three)
    assert states(matrix, capsys) == ["to do"] * 3 and not (folder / "runs").exists()
    play_only(matrix, index=0)
    runner.main(runner.Args(matrix, dry_run=True))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "--seed 2 " in line)
    subprocess.run(line.split("to do", 1)[1].split(), check=True, capture_output=True)  # just as it is printed
    assert states(matrix, capsys) == ["done", "finished, not exported", "to do"]
    play_only(matrix, index=1)
    (folder / "runs" / "tiny" / "CartPole-v1__ppo__3").mkdir()  # killed before it had learnt anything
    play_only(matrix, index=2)
    assert states(matrix, capsys) == ["done"] * 3
    result = "results/tiny/CartPole-v1/ppo_seed1.json"
    for name, value, said in (
        ("gamma", 0.5, "was made with --gamma 0.5, not 0.99"),  # another default was in force
        ("trained_steps", 224, "has 224 agent steps only"),
    ):
        kept = Path(result).read_text()
        record = json.loads(kept)
        (record if name == "trained_steps" else record["arguments"])[name] = value
        Path(result).write_text(json.dumps(record))
        assert states(matrix, capsys)[0] == f"differs: {result} {said}"
        with pytest.raises(SystemExit, match=f"error: {result} {said}; move it away"):
            runner.main(runner.Args(matrix))
        Path(result).write_text(kept)
    with pytest.raises(SystemExit, match="ppo__1/args.json was made with --max-episode-steps 20, not 19"):
        runner.main(runner.Args(write_matrix(changes={"-steps = 20": "-steps = 19"}), results=Path("others"), only=0))


def test_runs_made_by_hand_join_the_matrix_that_they_fit(folder, capsys):
    matrix = write_matrix(TINY + SPRIG)
    words = runner.flag_words(runner.plan_runs(matrix, Path("runs"), Path("results"))[1].flags)
    for run_dir, weight in (("mine", "0.5"), ("other", "0.25")):
        flags = [*words, "--run-dir", run_dir, "--perception-cost-weight", weight]
        sprig_continuous.main(runner.parse_words(flags, sprig_continuous, "here"))
    runner.main(runner.Args(matrix, collect=(Path("mine"),)))
    assert states(matrix, capsys) == ["to do", "done"]
    for place, said in (
        ("mine", "mine is done; results/tiny"),
        ("other", "other is no run of this matrix: .*--perception-cost-weight 0.25, not 0.5"),
        (".", ". is not the folder of a run"),
    ):
        with pytest.raises(SystemExit, match=said):
            runner.main(runner.Args(matrix, collect=(Path(place),)))


def test_a_fork_is_played_like_the_scripts(folder, monkeypatch):
    (folder / "my_sprig.py").write_text((ROOT / "sprig_continuous.py").read_text() + "\n# with a change\n")
    (folder / "broken.py").write_text("import there_is_no_such_module")
    monkeypatch.setattr(runner, "ROOT", folder)
    monkeypatch.syspath_prepend(folder)
    play_only(write_matrix(changes={"[arms.ppo]": "[arms.mine]", "ppo_continuous_baseline.py": "my_sprig.py"}))
    record = json.loads((folder / "results" / "tiny" / "CartPole-v1" / "mine_seed1.json").read_text())
    assert record["script"] == "my_sprig.py" and record["evaluation"]
    with pytest.raises(SystemExit, match="'broken.py' cannot be imported: ModuleNotFoundError"):
        play_only(write_matrix(changes={"ppo_continuous_baseline.py": "broken.py"}))


BAD = {
    "unknown key": ({"tasks =": "games ="}, "games is not a key"),
    "not TOML": ({"seeds = [1]": "seeds = [1"}, "is not TOML"),
    "unknown script": ({"ppo_continuous_baseline.py": "ppo.py"}, "there is no script 'ppo.py' in"),
    "unknown flag": ({"num-steps": "num-step"}, "Unrecognized options: --num-step, 32 Perhaps you meant: --num-steps"),
    "no flag": ({"num-steps": "no-anneal-lr = true\nnum-steps"}, "no_anneal_lr is not a flag; a switch is turned off"),
    "flag of the runner": ({"num-steps = 32": "num-steps = 32\nseed = 3"}, "--seed is not for the matrix"),
    "label": ({"[arms.ppo]": "[arms.PPO_1]"}, "arms.PPO_1: a label consists of"),
    "double seed": ({"seeds = [1]": "seeds = [1, 2, 1]"}, "is not a list of int, at least one, each once"),
    "hidden GPU": ({"num-steps = 32": "num-steps = 32\ndevice = 'cuda'"}, "device = 'cuda', but gpus = 0"),
    "the script's own check": ({"minibatch-size = 32": "minibatch-size = 7"}, "--minibatch-size 7 does not divide"),
    "unknown task": ({"CartPole-v1": "CartPol-v1"}, "CartPol-v1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_matrix_is_said_before_anything_starts(case, folder):
    changes, message = BAD[case]
    with pytest.raises(SystemExit) as error:
        runner.main(runner.Args(write_matrix(changes=changes)))
    assert message in error.value.code and error.value.code.startswith("error: tiny.toml"), error.value.code
    assert "\n" not in error.value.code and os.listdir() == ["tiny.toml"]


def test_bad_input_ends_with_one_line_and_exit_code_1(folder):
    assert end(start("no.toml")) == (1, "error: no.toml cannot be read: No such file or directory\n")
    code, said = end(start(write_matrix(changes={"seeds = [1]": "seeds = [1]\ncpus = 200"})))
    assert code == 1 and said.splitlines()[-1] == "error: a run needs 200 CPUs and 0 GPUs, which no machine has"
    code, said = end(start(write_matrix(), "--address", "127.0.0.1:1"))
    assert code == 1 and said.splitlines()[-1] == "error: --address 127.0.0.1:1: [Errno 111] Connection refused"
    with pytest.raises(SystemExit, match="--results tiny.toml/x cannot be written: Not a directory"):
        runner.main(runner.Args(write_matrix(), results=Path("tiny.toml/x")))


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmark/matrices/*.toml")), ids=lambda path: path.stem)
def test_committed_matrices_are_sound_and_committed_results_are_theirs(path):
    runs = runner.plan_runs(path, Path("no-such-folder"), ROOT / "benchmark" / "results")
    screen = path.stem.endswith("-screen")  # seeds from 101 on are for tuning
    assert all((run.seed >= 101) == screen for run in runs)
    assert not [state for state in map(runner.find_state, runs) if state.startswith("differs")]


BAD_SPEED = [
    ({"rounds": 0}, "--rounds 0 is less than 1"),
    ({"flags": "--num-step 3"}, "--flags: ppo_atari_baseline.py: Unrecognized options: --num-step"),
    ({"flags": "--compile '"}, "--flags --compile ': No closing quotation"),
    ({"against": Path("/proc")}, "/proc has no ppo_atari_baseline.py"),
    ({"cleanrl": ROOT}, "has no cleanrl/ppo_atari.py"),
    ({"results": Path("/proc/x")}, "--results /proc/x cannot be written"),
    ({"results": ROOT / "benchmark" / "results", "name": "speed"}, "speed.csv or its .md is there already"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_SPEED)
def test_speed_refuses_what_it_cannot_measure_before_it_measures(changes, message):
    with pytest.raises(SystemExit, match=message) as error:
        speed.main(speed.Args(**changes))
    assert "\n" not in error.value.code


def test_speeds_are_compared_within_rounds():
    names, rounds = speed.SCRIPTS["atari"], []
    for drift, speeds in ((1, (300, 100)), (5, (400, 100)), (2, (200, 100))):  # of the machine
        quantities = [dict.fromkeys((speed.STEPS, speed.CPU, speed.MEMORY), drift * fast) for fast in speeds]
        rounds.append(dict(zip(names, quantities)))
    text = speed.table(rounds, "", speed.Args())
    assert f"| {names[0]} over {names[1]}, steps per second | 3.00 | 2.00 | 4.00 |" in text
    assert f"| {names[0]}, steps per second | 400 | 300 | 2,000 |" in text
    with pytest.raises(SystemExit, match="this failed: error: last words"):
        speed.spent([sys.executable, "-c", "raise SystemExit('first\\nerror: last words')"], "this", speed.Args())


def small_run(script, **changes):
    """The folder of a run that has hardly learnt anything."""
    settings = {"num_envs": 2, "num_steps": 32, "minibatch_size": 32, "total_timesteps": 64, "eval_episodes": 0}
    script.main(script.Args(run_dir="run", device="cpu", threads=1, **settings | changes))
    return Path("run")


def test_a_policy_that_hardly_sees_has_no_information(folder):
    run = small_run(sprig_continuous, env_id="CartPole-v1")
    _, own, copied, entropy, information = blind.beside_its_blind_copy(run, blind.Args(games=10))
    assert 8 < float(own) < 60 and 8 < float(copied) < 60
    assert float(entropy) == pytest.approx(math.log(2), abs=0.02) and float(information) < 0.02


def test_a_cheetah_that_has_learnt_nothing_is_on_its_feet(folder):
    run = small_run(sprig_continuous, env_id="HalfCheetah-v5")
    _, mean_return, on_its_back, fewest = gait.move(run, gait.Args([run], games=2))
    assert float(mean_return) < 0 and 0 <= float(fewest) <= float(on_its_back) < 1


def test_probe_reads_what_is_linear_in_the_features_and_nothing_else():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 30)).astype(np.float32)
    targets = np.stack([features @ rng.normal(size=30), rng.normal(size=500), np.ones(500)], axis=1)
    linear, noise, constant = probe.probe(features, targets, np.arange(500) % 5 // 2)
    assert linear > 0.99 and noise < 0.1 and np.isnan(constant)


@pytest.mark.parametrize("script", [sprig_atari, sprig_continuous])
@pytest.mark.parametrize("attention_off", [False, True])
def test_real_runs_are_probed(script, attention_off, folder, capsys):
    run = small_run(script, **({} if script is sprig_atari else {"env_id": "Pendulum-v1", "distractors": 2}))
    capsys.readouterr()
    probe.main(probe.Args([run], steps=40, attention_off=attention_off))
    head, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert all(len(row) == len(head) for row in rows) and rows[0][0] == "run"
    if script is sprig_continuous and not attention_off:
        assert rows[0][1:3] == ["3", "2"] and all(0.3 < float(cell) < 5 / 3 for cell in rows[0][3:])
