"""benchmark/plot.py: its statistics, what it refuses, runs without a matrix, and that the committed documents agree."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import plot
import pytest
from conftest import ROOT
from scipy import stats

STEPS = 20_000
MATRIX = """
tasks = ["Near-v1", "far/Away-v1"]
seeds = [1, 2, 3]
[flags]
total-timesteps = 20_000
gamma = 0.9
[arms.ppo]
title = "PPO"
script = "ppo.py"
[arms.sprig]
title = "SPRIG"
script = "sprig.py"
flags = { update = "joint", target-kl = "None" }
"""
QUESTIONS = """
curves = { m = ["m"] }
[[forest]]
matrix = "m"
[[question]]
ask = "Ahead?"
matrix = "m"
what = ["sprig"]
against = "ppo"
planned = true
"""
PAGE = "before\n<!-- results: sprig-over-ppo -->\n<!-- end -->\n<!-- results: questions -->\nold\n<!-- end -->\nafter\n"
ENTRY = {"ask": "?", "matrix": "m", "what": ["sprig"], "against": "ppo"}


def games(level, seed, steps=STEPS):
    """Rows of episodes.csv as a script writes them: returns that rise from 0 to about `level` after STEPS."""
    ends = np.arange(100, steps + 1, 100)
    returns = level * ends / STEPS + np.random.default_rng(seed).normal(0, 1, len(ends))
    columns = {"agent_steps": ends, "seconds": ends / 1000, "episodic_return": returns, "episodic_length": 100}
    return pd.DataFrame(columns)


def record(script, task, seed, **other):
    own = {"env_id": task, "seed": seed, "total_timesteps": STEPS, "num_envs": 2, "num_steps": 1000, "gamma": 0.9}
    return {"script": script, "arguments": own | {"anneal_lr": False} | other}


def make_run(folder, script="ppo.py", task="Near-v1", seed=1, level=100, steps=STEPS, **other):
    """A run's folder, finished if it has all its steps."""
    folder.mkdir(parents=True)
    folder.joinpath("args.json").write_text(json.dumps(record(script, task, seed, **other)))
    games(level, seed, steps).to_csv(folder / "episodes.csv", index=False)
    if steps == STEPS:
        folder.joinpath("model.pt").touch()
        folder.joinpath("evaluation.json").write_text(json.dumps({"mean": level, "returns": [level]}))
    return folder


def export(path, script, task, seed, level, **other):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record(script, task, seed, **other) | {"evaluation": None, "trained_steps": STEPS}))
    games(level, seed).to_csv(path.with_suffix(".csv.gz"), index=False)


def result(root, label="sprig", seed=2, task="Near-v1"):
    return root / "benchmark" / "results" / "m" / task.replace("/", "-") / f"{label}_seed{seed}.json"


@pytest.fixture
def root(tmp_path):
    """A repository with one matrix, complete: SPRIG 30 above PPO on one task, hardly on the other."""
    for task, level in (("Near-v1", 130), ("far/Away-v1", 101)):
        for seed in (1, 2, 3):
            export(result(tmp_path, "ppo", seed, task), "ppo.py", task, seed, 100 + seed)
            ours = result(tmp_path, "sprig", seed, task)
            export(ours, "sprig.py", task, seed, level + seed, update="joint", target_kl=None)
    texts = {"benchmark/matrices/m.toml": MATRIX, "benchmark/results/questions.toml": QUESTIONS}
    for name, text in (texts | {"docs/results.md": PAGE, "README.md": "no table\n"}).items():
        tmp_path.joinpath(name).parent.mkdir(exist_ok=True)
        tmp_path.joinpath(name).write_text(text)
    shutil.copy(ROOT / "benchmark" / "results" / "figure2_beamrider.csv", tmp_path / "benchmark" / "results")
    return tmp_path


def publish(root):
    plot.main(plot.Args(root=root, publish=True))
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refusal(root):
    with pytest.raises(SystemExit) as error:
        plot.main(plot.Args(root=root, check=True))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_point_is_the_mean_of_the_games_that_ended_in_its_window():
    rows = pd.DataFrame({"agent_steps": [5, 95, 100, 1000], "episodic_return": [1.0, 2.0, 6.0, 9.0]})
    run = plot.Run(Path("x"), "ppo.py", "T", 1, {}, rows, 1000, None)
    assert list(run.curve()[[0, 9, 18, 99]]) == [1, 3, 4, 9]  # games up to step 10, up to 100, in (90, 190], at the end
    assert run.score("final") == 9 and run.score("final", 100) == 4 and run.score("area") == (3 + 9) / 2
    assert np.isnan([run.score("evaluation"), run.curve()[19]]).all()


def test_differences_have_the_textbook_interval_and_the_textbook_power():
    x, y = np.array([3.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    a, b = 4 / 3, 2.5 / 5
    half = stats.t.ppf(0.975, (a + b) ** 2 / (a**2 / 2 + b**2 / 4)) * np.sqrt(a + b)
    test = plot.welch(x, y)
    assert [test["difference"], test["low"], test["high"]] == pytest.approx([2, 2 - half, 2 + half])
    assert plot.detectable(*np.array([[-1, -1, 0, 1, 1]] * 2)) == pytest.approx(2.024, abs=0.001)  # as in G*Power
    still = plot.welch(np.full(3, 1000.0), np.full(3, 1000.0))
    assert still["difference"] == 0 and np.isnan([still["low"], still["high"], still["p"]]).all()


def test_a_row_is_corrected_after_holm_for_its_tests(root):
    tests, early = (plot.Published(root).tests(ENTRY | more) for more in ({}, {"steps": STEPS // 2}))
    small, large = sorted(tests["p"])
    assert 0.1 < large < 0.5 and sorted(tests["corrected"]) == pytest.approx([2 * small, large])
    assert early["difference"][0] == pytest.approx(tests["difference"][0] / 2, abs=3)  # returns rise with the steps
    root.joinpath("benchmark/matrices/n.toml").write_text(MATRIX)  # of which nothing is played: the pool has it from m
    assert plot.Published(root).tests(ENTRY | {"matrix": "n", "also": ["m"]})["p"].equals(tests["p"])


def test_across_tasks_outliers_are_left_out_and_the_reference_varies_too():
    x = np.array([[200.0, 2.0]] * 3 + [[9000.0, -90.0]])  # a quarter of the scores at either end is cut
    y = np.array([[100.0, 1.0]] * 4)
    ratio, ahead = plot.across(x, y)
    assert ratio[0] == 2 and plot.across(x, x)[0][0] == 1 and ahead[0] == pytest.approx((1 + 3 / 4) / 2)
    (_, low, high), _ = plot.across(2 * y, y * np.array([[0.5], [1.5], [0.7], [1.3]]))
    assert low < 2 < high


# A shift of 2.6 has p = 0.033, which is enough for a planned test alone.
VERDICTS = [("more", True, 30, "shown"), ("less", True, 30, "refuted"), ("different", True, -30, "shown")]
VERDICTS += [("more", True, 2.6, "shown"), ("more", False, 2.6, "not shown"), ("more", True, 1.6, "not shown")]


def test_a_verdict_needs_a_planned_test_or_a_very_clear_one(root):
    published = plot.Published(root)
    for claim, planned, shift, verdict in VERDICTS:
        side = {f"runs/m/T__ppo__{seed}": 10.0 + seed for seed in (1, 2, 3)}
        side |= {name.replace("ppo", "sprig"): value + shift for name, value in side.items()}
        pd.Series(side, name="depth").to_csv(root / "benchmark" / "results" / "side.csv")
        entry = ENTRY | {"tasks": ["Near-v1"], "file": "side.csv", "column": "depth"}
        assert published.question(entry | {"claim": claim, "planned": planned})["verdict"] == verdict
    both = [published.question(entry | {"aggregate": True, "planned": planned}) for planned in (True, False)]
    assert [cells["verdict"] for cells in both] == ["shown", "not tested"]


OTHER = [("gamma", 0.8, "m has 0.9"), ("update", "split", "m has 'joint'"), ("target_kl", 0.01, "m has None")]
OTHER += [("env_id", "Far-v2", "m has 'Near-v1'"), ("seed", 3, "m has 2")]
OTHER += [("anneal_lr", True, "its other seeds have False"), ("script", "ppo.py", "m has sprig.py")]
OTHER += [("trained_steps", 18_000, "has 18,000 agent steps; m has 20,000")]


@pytest.mark.parametrize("name, value, said", OTHER)
def test_a_result_that_its_matrix_did_not_ask_for_is_refused_by_name(root, name, value, said):
    held = json.loads(result(root).read_text())
    (held if name in held else held["arguments"])[name] = value
    result(root).write_text(json.dumps(held))
    message = refusal(root)
    assert str(result(root)) in message and said in message


def test_a_stray_or_damaged_result_is_refused_by_name_and_an_unfinished_matrix_is_not_tested(root):
    for label, seed, task in [("other", 1, "Near-v1"), ("ppo", 4, "Near-v1"), ("ppo", 1, "Else-v1")]:
        export(stray := result(root, label, seed, task), "ppo.py", task, seed, 100)
        assert f"{stray.with_suffix('.csv.gz')} is not in" in refusal(root)
        stray.unlink(), stray.with_suffix(".csv.gz").unlink()
    packed = result(root).with_suffix(".csv.gz").read_bytes()
    for damaged in (b"agent_steps,seconds\n1,2\n", packed[:99] + bytes(9) + packed[108:]):
        result(root).with_suffix(".csv.gz").write_bytes(damaged)
        assert f"{result(root)} is no run, or damaged" in refusal(root)
    result(root).with_suffix(".csv.gz").unlink()
    assert f"{result(root)} is no run: there is no sprig_seed2.csv.gz" in refusal(root)
    result(root).unlink()
    root.joinpath("benchmark/matrices/n.toml").write_text(MATRIX)  # of which nothing is played
    for more, runs in ({}, "11 of 12"), ({"also": ["n"]}, "11 of 24"), ({"against": "n/ppo"}, "11 of 24"):
        cells = plot.Published(root).question(ENTRY | more)
        assert cells["effect"] == f"running: {runs} runs" and cells["verdict"] == "open"


def test_publishing_twice_gives_the_same_bytes_and_check_finds_tampering(root):
    page, figure = root / "docs" / "results.md", root / "benchmark" / "results" / "forest.png"
    assert "docs/results.md" in refusal(root) and page.read_text() == PAGE and not figure.exists()
    first, text = publish(root), page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| Near | 20k | 1 to 3 | " in text and "| Ahead? |" in text and "shown on Near" in text
    figure.unlink()
    assert publish(root) == first  # drawn anew, to the byte
    plot.main(plot.Args(root=root, check=True))
    page.write_text(text.replace("| 20k |", "| 30k |"))
    figure.write_bytes(figure.read_bytes()[:-1])
    assert "docs/results.md" in (message := refusal(root)) and "forest.png" in message and "m.png" not in message
    assert publish(root) == first
    for text, said in [("no -->\n<!-- end", "asks for the table 'no'"), ("questions", "has no '<!-- end -->'")]:
        (root / "README.md").write_text(f"<!-- results: {text} -->\n")
        assert said in refusal(root)
    (root / "README.md").write_text("no table\n")
    export(result(root), "sprig.py", "Near-v1", 2, 7, update="joint", target_kl=None)
    assert all(name in (message := refusal(root)) for name in ("docs/results.md", "forest.png", "m.png"))


def test_committed_documents_and_figures_are_what_the_data_give():
    plot.main(plot.Args(root=ROOT, check=True))
    assert (ROOT / "docs" / "results.md").stat().st_size <= 25_600


def test_runs_are_drawn_without_a_matrix(tmp_path, capsys):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"a{seed}", seed=seed)
        make_run(tmp_path / f"b{seed}", seed=seed, level=200, gamma=0.5, device="cuda", run_dir=f"b{seed}")
    make_run(tmp_path / "unfinished", task="Else-v1", steps=5000)
    make_run(tmp_path / "begun", task="Else-v1", seed=2, steps=50)
    export(tmp_path / "kept_seed4.json", "ppo.py", "Near-v1", 4, 100)
    plot.main(plot.Args((tmp_path,), tmp_path / "figures" / "curves.png"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (usual,) = [line for line in lines if line[:4] == ["Near-v1", "ppo", "4", "20,000"]]
    assert float(usual[4]) == pytest.approx(95, abs=1.5)  # the last tenth of a line that ends at 100
    assert ["Near-v1", "ppo", "--gamma", "0.5", "3", "20,000"] in [line[:6] for line in lines]
    assert ["Else-v1", "ppo", "1", "5,000"] in [line[:4] for line in lines] and lines[-1][-1] == "1"
    assert (tmp_path / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    make_run(short := tmp_path / "short", seed=9, level=300, steps=10_000)  # a kind is drawn as far as all have come
    groups = plot.group_runs([plot.read_run(tmp_path / "a1"), plot.read_run(short)])
    assert plot.draw_curves(groups).axes[0].lines[0].get_xydata()[-1] == pytest.approx((10, 200 * 0.475), abs=2)


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path):
    run, bare = make_run(tmp_path / "runs" / "whole"), make_run(tmp_path / "bare")
    (bare / "episodes.csv").unlink()
    output = tmp_path / "curves.png"
    for args, said in [
        (plot.Args((tmp_path / "absent",), output), "absent does not exist"),
        (plot.Args((run, bare), output), "bare is no run: there is no episodes.csv"),
        (plot.Args((make_run(tmp_path / "empty", steps=50),), output), "none of these runs has a whole game yet"),
        (plot.Args((run,), tmp_path / "curves.bmp"), "should end in .png"),
        (plot.Args((run,), run / "args.json" / "curves.png"), "--output .* cannot be written: "),
        (plot.Args((run,), output, publish=True), "name runs to draw, or"),
    ]:
        with pytest.raises(SystemExit, match=said):
            plot.main(args)
    assert not list(tmp_path.glob("curves.*"))
