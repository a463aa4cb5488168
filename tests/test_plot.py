"""Tables and figures: the numbers behind them on cases with known answers, and that the committed ones are current."""

import csv
import dataclasses
import gzip
import json
import re
import shutil
import subprocess
import sys

import decisions
import numpy as np
import plot
import pytest
import scale
import speed
from conftest import ROOT
from rliable import library, metrics
from scipy import stats

MATRIX = (
    'question = "?"\ntasks = ["Task-v1", "other/Task-v1"]\nseeds = [1, 2, 3, 4, 5]\n[flags]\ntotal-timesteps = 1000\n'
)
MATRIX += '[arms.ppo]\ntitle = "PPO"\n[arms.a1]\ntitle = "A1"\n[arms.a2]\n'


def put(folder, arm, seed, level, steps=1000, evaluation=True, late=False):
    """A run of 100 games, one each steps/100: level, level + 1, level, ...; `late` subtracts 4 in the first half."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{steps // 100 * i},{i},{level + i % 2 - 4 * (late and i <= 50)},10" for i in range(1, 101)]
    text = "\n".join(["agent_steps,seconds,episodic_return,episodic_length", *rows])
    (folder / f"{arm}_seed{seed}.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    record = {"hardware": {"cpu": "X", "cores": 2, "gpu": None}, "trained_steps": steps}
    record["evaluation"] = {"mean": level} if evaluation else None
    (folder / f"{arm}_seed{seed}.json").write_text(json.dumps(record))


@pytest.fixture
def made(tmp_path):
    """Arguments for a folder with the matrix m, no run yet, and one document."""
    (tmp_path / "matrices").mkdir()
    (tmp_path / "matrices" / "m.toml").write_text(MATRIX)
    (tmp_path / "results").mkdir()
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- table: m -->\n<!-- end -->\nb\n<!-- table: m comparison -->\nold\n<!-- end -->\nc\n")
    return plot.Args(tmp_path / "results", tmp_path / "matrices", (document,))


def rows_of(args, names=("m", "m comparison")):
    """Cells of the page's table rows, after it has been written."""
    plot.main(args)
    lines = args.documents[0].read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


# ---------------------------------------------------------------- reading


def test_reader_reads_what_is_written(tmp_path):
    put(tmp_path, "ppo", 3, 7.0, evaluation=False)
    run = plot.read_run(tmp_path / "ppo_seed3.csv.gz")
    assert (run.arm, run.seed, run.steps, run.evaluation, run.hardware) == ("ppo", 3, 1000, None, "X, 2 cores")
    assert (
        run.games.shape == (100, 3) and run.games[0].tolist() == [10, 1, 8] and run.games[-1].tolist() == [1000, 100, 7]
    )


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def garble(path):
    data = bytearray(path.read_bytes())
    data[20:40] = b"\xff" * 20
    path.write_bytes(data)


def rename_column(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"seconds", b"minutes")))


def spoil_a_return(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"10,1,", b"10,nan,", 1)))


def lose_games(path):
    path.unlink()


def lose_record(path):
    path.with_name("ppo_seed1.json").unlink()


def empty_record(path):
    path.with_name("ppo_seed1.json").write_text("{}")


DAMAGES = [cut, garble, rename_column, spoil_a_return, lose_games, lose_record, empty_record]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data_are_named_in_one_line_and_nothing_is_written(damage, made):
    for seed in (1, 2):
        put(made.results / "m" / "Task-v1", "ppo", seed, 5.0)
    damage(made.results / "m" / "Task-v1" / "ppo_seed1.csv.gz")
    before = made.documents[0].read_text()
    with pytest.raises(SystemExit, match=r"^error: .*ppo_seed1.*") as stop:
        plot.main(made)
    assert "\n" not in str(stop.value)
    assert made.documents[0].read_text() == before and not list(made.results.glob("*.png"))


def test_what_was_measured_on_the_patch_task_is_a_table(made):
    some = list(decisions.VARIANTS)[:2]
    rows = [(some[0], 103, 0.2), (some[0], 101, 0.3), (some[0], 102, 0.25), (some[1], 101, 0.5), (some[1], 103, 0.5)]
    scores = "".join(f'"{variant}",{seed},2048,{score:.4f}\n' for variant, seed, score in rows)
    (made.results / "decisions.csv").write_text(f"variant,seed,steps,score\n{scores}")
    made.documents[0].write_text("<!-- table: decisions -->\n<!-- end -->\n")
    plot.main(made)
    assert rows_of(made)[1:] == [
        [some[0], "101, 102, 103", "0.30, 0.25, 0.20", "0.25 ± 0.05"],
        [some[1], "101, 103", "0.50, 0.50", "0.50"],
    ]
    (made.results / "decisions.csv").write_text("variant,seed,steps,score\nanother,101,2048,0.5\n")
    with pytest.raises(SystemExit, match="decisions.csv is not a table of .* of today's variants"):
        plot.main(made)


def test_what_the_probe_found_is_a_table(made):
    (made.results / "probe_x.csv").write_text("run,R²\nruns/x__a__1,0.25\nruns/x__a__2,0.75\n")
    made.documents[0].write_text("<!-- table: probe_x -->\n<!-- end -->\n")
    assert rows_of(made) == [["run", "runs", "R²"], ["runs/x__a", "2", "0.50 ± 0.35"]]


def test_rows_of_a_matrix_carry_its_arms_titles(made):
    names = ["runs/m/C-v1__a1__1", "runs/m/C-v1__a1__2", "runs/m/C-v1__other__1", "runs/n/C-v1__a1__1"]
    (made.results / "probe_x.csv").write_text("run,R²\n" + "".join(f"{name},0.5\n" for name in names))
    made.documents[0].write_text("<!-- table: probe_x -->\n<!-- end -->\n")
    titles = [row[0] for row in rows_of(made)[1:]]
    assert titles == ["A1 (C-v1)", "runs/m/C-v1__other", "runs/n/C-v1__a1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("<!-- table: n -->\n<!-- end -->", "'n'"), ("<!-- table: m -->\n", "no '<!-- end -->'")],
)
def test_markers_that_mean_nothing_are_refused(text, message, made):
    made.documents[0].write_text(text)
    with pytest.raises(SystemExit, match=message):
        plot.main(made)
    assert made.documents[0].read_text() == text


def test_results_without_a_matrix_are_refused(made):
    put(made.results / "unknown" / "Task-v1", "ppo", 1, 5.0)
    with pytest.raises(SystemExit, match=r"no .*unknown\.toml"):
        plot.main(made)


# ---------------------------------------------------------------- statistics


def test_curve_averages_the_games_of_the_last_tenth():
    steps = np.arange(1, 101)
    points = plot.curve(steps, steps.astype(float), 100)
    np.testing.assert_allclose(points[9:], steps[9:] - 4.5)  # k-9 ... k
    np.testing.assert_allclose(points[:10], (1 + steps[:10]) / 2)  # as far back as there are any
    assert np.isnan(plot.curve(steps[50:], steps[50:], 100)[:50]).all()
    run = plot.Run("ppo", 1, 100, np.stack([steps, steps, steps], 1).astype(float), None, "")
    assert run.final == 95.5 and run.area == pytest.approx(50.5)


def test_a_suspended_run_is_drawn_as_if_it_had_gone_on():
    """A rollout of 1000 steps takes 10 s and ends one to three games; after step 5000 the process slept for an hour."""
    random = np.random.default_rng(0)
    ends = np.repeat(np.arange(1, 21) * 1000, random.integers(1, 4, size=20))  # each game's rollout
    steps = np.sort(ends - random.integers(0, 1000, size=len(ends)))
    games = np.stack([steps, ends / 100, np.ones(len(ends))], axis=1)
    np.testing.assert_allclose(plot.without_pauses(games), ends / 100)
    slept = games.copy()
    slept[ends > 5000, 1] += 3600
    np.testing.assert_allclose(plot.without_pauses(slept), ends / 100, atol=2)
    slow = games.copy()
    slow[ends > 5000, 1] += 70  # seven times as long as usual: a slow stretch stays
    np.testing.assert_array_equal(plot.without_pauses(slow), slow[:, 1])
    assert plot.without_pauses(games[:0]).shape == (0,)


def test_interquartile_mean_is_a_trimmed_mean_relative_to_the_reference():
    rng = np.random.default_rng(1)
    x, reference = rng.normal(5, 1, (6, 3)), rng.normal(4, 1, (4, 3))
    for n in range(1, 7):
        scores = x[:n] / reference.mean(0)
        assert plot.relative_iqm(x[:n], reference) == pytest.approx(metrics.aggregate_iqm(scores))
        assert plot.relative_mean(x[:n], reference) == pytest.approx(metrics.aggregate_mean(scores))
    known = np.array([[0.0, 1], [2, 3], [4, 5], [6, 100]])  # the middle half of 8 scores is 2, 3, 4, 5
    assert plot.relative_iqm(known, np.ones((3, 2))) == 3.5


@pytest.mark.parametrize("statistic", [plot.relative_iqm, plot.relative_mean, plot.improvement])
def test_intervals_across_tasks_are_rliables(statistic):
    rng = np.random.default_rng(1)
    x, reference = rng.normal(5, 1, (6, 3)), rng.normal(4, 1, (4, 3))
    scores = {"": [x, reference]}
    estimates, ends = library.get_interval_estimates(scores, lambda *x: np.array([statistic(*x)]), reps=20_000)
    estimate, low, high = plot.across_tasks(x, reference, statistic)
    assert estimate == estimates[""][0]
    assert [low, high] == pytest.approx(ends[""][:, 0], abs=0.05 * (high - low))


def covered(samples, truth, ends) -> float:
    """In what share of the samples the interval holds the truth."""
    return np.mean([low < truth < high for low, high in map(ends, samples)])


@pytest.mark.parametrize(("seeds", "share"), [(3, 0.75), (5, 0.85)])
def test_bootstrap_intervals_of_few_seeds_are_too_narrow(seeds, share):
    """By as much as plot.py says; that of Hedges' g is not."""
    pairs = np.random.default_rng(2).normal(0, 1, (600, 2, seeds))
    means = covered(pairs, 0, lambda pair: plot.interval(lambda sample: sample.mean(-1), pair[0]))
    assert means == pytest.approx(share, abs=0.05)
    for size in (1, 4):
        sizes = covered(pairs + [[size], [0]], size, lambda pair: plot.hedges_interval(*pair))
        assert sizes == pytest.approx(0.95, abs=0.02)


def test_the_bootstrap_of_an_interquartile_mean_over_tasks_is_a_little_too_narrow(monkeypatch):
    monkeypatch.setattr(plot, "RESAMPLES", 2000)
    pairs = np.random.default_rng(2).normal(10, 1, (600, 2, 5, 2))
    share = covered(pairs, 1, lambda pair: plot.across_tasks(*pair, plot.relative_iqm)[1:])
    assert share == pytest.approx(0.9, abs=0.035)


def test_interval_of_a_ratio_holds_the_truth_and_agrees_with_welch():
    """Fieller's, for normal samples of unequal size and variance."""
    rng, held = np.random.default_rng(3), []
    for _ in range(2000):
        x, reference = rng.normal(12, 4, 5), rng.normal(10, 2, 7)
        low, high = plot.ratio_interval(x, reference)
        held.append(low <= 1.2 <= high)
        assert low < x.mean() / reference.mean() < high
        assert (low <= 1 <= high) == (stats.ttest_ind(x, reference, equal_var=False).pvalue >= 0.05)
    assert 0.93 < np.mean(held) < 0.97
    assert plot.ratio_interval(rng.normal(5, 1, 5), rng.normal(0.1, 1, 5)) is None
    assert plot.ratio_interval(np.full(3, 6.0), np.full(3, 4.0)) == (1.5, 1.5)
    assert plot.ratio_interval(np.full(3, 0.1), np.full(3, 0.1)) == (1, 1)  # whose computed variance is not 0


def test_contrast_of_two_is_welch_and_that_of_four_holds_the_truth():
    rng, held = np.random.default_rng(4), []
    x, y = rng.normal(1, 1, 5), rng.normal(0, 3, 8)
    welch = stats.ttest_ind(x, y, equal_var=False)
    estimate, half, p = plot.contrast([(1, x), (-1, y)])
    assert (estimate - half, estimate + half) == pytest.approx(tuple(welch.confidence_interval()))
    assert p == pytest.approx(welch.pvalue)
    for _ in range(2000):
        samples = [
            (sign, rng.normal(level, spread, 5))
            for sign, level, spread in ((1, 3, 1), (-1, 2, 2), (1, 0, 3), (-1, 5, 1))
        ]
        estimate, half, p = plot.contrast(samples)
        held.append(abs(estimate + 4) <= half)
    assert 0.93 < np.mean(held) < 0.98
    estimate, *unknown = plot.contrast([(1, np.full(5, 7.0)), (-1, np.full(5, 4.0))])
    assert estimate == 3 and np.isnan(unknown).all()
    assert np.isnan(plot.contrast([(1, np.full(3, 0.1)), (-1, np.full(3, 0.2))])[1:]).all()


def test_probability_of_improvement():
    low, high = np.array([[1.0], [2], [3]]), np.array([[4.0], [5]])
    assert plot.improvement(high, low) == 1 and plot.improvement(low, high) == 0 and plot.improvement(low, low) == 0.5
    assert plot.improvement(np.array([[2.0], [2.5]]), low) == pytest.approx((1.5 + 2) / 6)
    rng = np.random.default_rng(2)
    x, reference = rng.integers(0, 5, (6, 3)), rng.integers(0, 5, (4, 3))  # with ties
    assert plot.improvement(x, reference) == pytest.approx(metrics.probability_of_improvement(x, reference))


def test_holm():
    np.testing.assert_allclose(plot.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(plot.holm([0.6, 0.7]), [1, 1])
    assert len(plot.holm([])) == 0


def test_permutations_and_effect_size():
    reference = np.arange(1.0, 6)
    assert plot.permutation_test(reference + 10, reference) == pytest.approx(2 / 252)
    assert plot.hedges(reference + 1, reference) == pytest.approx((1 - 3 / 31) / np.sqrt(2.5))
    for shift in np.linspace(0, 3, 31):  # it holds 0 if and only if Student's test finds nothing
        low, high = plot.hedges_interval(reference + shift, reference)
        assert (low < 0 < high) == (stats.ttest_ind(reference + shift, reference).pvalue > 0.05)
    low, high = plot.interval(lambda sample: sample.mean(-1), np.stack([reference, reference + 100]))  # (2, 5)
    np.testing.assert_allclose(high - low, (high - low)[0])  # the same seeds are drawn for every row
    assert low[0] < 3 < high[0]


def test_bootstraps_leave_the_global_generator_alone_and_do_not_depend_on_it():
    x, reference = np.random.default_rng(3).normal(5, 1, (2, 4, 2))
    np.random.seed(5)  # noqa: NPY002
    first, following = plot.across_tasks(x, reference, plot.relative_iqm), np.random.rand()  # noqa: NPY002
    assert plot.across_tasks(x, reference, plot.relative_iqm) == first
    np.random.seed(5)  # noqa: NPY002
    assert np.random.rand() == following  # noqa: NPY002


# ---------------------------------------------------------------- tables


def test_a_matrix_that_was_not_run_says_how(made):
    plot.main(made)
    line = "Not run yet: `python benchmark/run.py benchmark/matrices/m.toml`."
    assert made.documents[0].read_text().count(line) == 2 and "old" not in made.documents[0].read_text()


def test_single_values_then_intervals_then_tests_as_seeds_grow(made):
    folder = made.results / "m" / "Task-v1"
    for seed in range(1, 6):
        for arm, level in (("ppo", 100), ("a1", 150), ("a2", 200)):
            put(folder, arm, seed, level + seed)
        if seed == 2:
            rows = rows_of(made)
            assert ["Task-v1", "1,000", "A1", "2", "152, 152", "152, 152", "151, 152"] in rows
            assert ["Task-v1", "1,000", "A1", "2 and 2", "1.49", "50.0", *["too few seeds"] * 3] in rows
        if seed == 3:
            rows = rows_of(made)
            assert ["Task-v1", "1,000", "PPO", "3", "102 ± 1.0", "102 ± 1.0", "102 ± 1.0"] in rows
            (row,) = (row for row in rows if row[2:4] == ["A1", "3 and 3"])
            assert row[4].startswith("1.49 [") and row[5:] == ["50.0", *["too few seeds"] * 3]
    rows = rows_of(made)
    (row,) = (row for row in rows if row[2:4] == ["A1", "5 and 5"])
    assert row[4].startswith("1.48 [") and row[5].startswith("50.0 [")
    assert row[7] == "< 0.001" and row[8] == "0.016"  # 2 of 252, and two arms are compared
    (row,) = (row for row in rows if row[:2] == ["A1", "5 and 5"])
    assert row[2].startswith("1.48 [") and row[3].startswith("1.48 [") and row[4] == "1.00 [1.00, 1.00]"


def test_every_seed_of_an_arm_stands_in_a_row_from_low_to_high(made):
    made.documents[0].write_text("<!-- table: m seeds -->\n<!-- end -->\n")
    for seed, level in enumerate((30, 10, 200), start=1):
        put(made.results / "m" / "Task-v1", "ppo", seed, level)
    assert rows_of(made)[1:] == [["Task-v1", "1,000", "PPO", "3", "10.5, 30.5, 200"]]


def test_a_ratio_to_what_may_be_zero_has_no_interval(made):
    """Resamples whose reference is negative would turn the worst score into the best."""
    folder = made.results / "m" / "Task-v1"
    for seed, level in enumerate((10, -9, 3, 4, 2), start=1):
        put(folder, "ppo", seed, level)
        put(folder, "a1", seed, -6 + seed)
    rows = {row[2]: row for row in rows_of(made) if len(row) == 9 and row[0] == "Task-v1"}
    assert rows["A1"][4].endswith(" (no interval)") and "[" not in rows["A1"][4] and "[" in rows["A1"][5]
    page = made.documents[0].read_text()
    assert page.count("(no interval)") == 3, "neither has the interquartile mean, or the mean"
    assert "No interval of a ratio where PPO's mean may be zero" in page
    assert plot.may_vanish(np.array([1.0, -1, 1, 1, 1])) and not plot.may_vanish(np.array([1.0, 2, 1, 1, 1]))


def test_the_least_p_of_many_permutations_is_that_of_those_drawn(made):
    matrix = made.matrices / "m.toml"
    matrix.write_text(matrix.read_text().replace("[1, 2, 3, 4, 5]", str(list(range(1, 11)))))
    for seed in range(1, 11):
        put(made.results / "m" / "Task-v1", "ppo", seed, seed)
        put(made.results / "m" / "Task-v1", "a1", seed, 100 + seed)
    rows = {row[2]: row for row in rows_of(made) if len(row) == 9 and row[0] == "Task-v1"}
    assert rows["A1"][-1] == "< 0.001"
    assert "cannot give a p under 0.0002 before the correction" in made.documents[0].read_text()


def test_a_task_that_every_seed_solves_has_no_spread_and_no_difference(made):
    for seed in range(1, 6):
        for arm in ("ppo", "a1"):
            put(made.results / "m" / "Task-v1", arm, seed, 1000)
    (row,) = (row for row in rows_of(made) if row[2:4] == ["A1", "5 and 5"])
    assert row[4:] == ["1.00 [1.00, 1.00]", "0.0", "no spread", "1.000", "1.000"]
    for seed in range(1, 6):
        put(made.results / "m" / "Task-v1", "a1", seed, 900)
    (row,) = (row for row in rows_of(made) if row[2:4] == ["A1", "5 and 5"])
    assert row[5:] == ["-100", "no spread", "no spread", "0.008"]


def test_who_learns_later_is_behind_over_training_alone(made):
    for seed in range(1, 6):
        put(made.results / "m" / "Task-v1", "ppo", seed, 7.5)
        put(made.results / "m" / "Task-v1", "a1", seed, 7.5, late=True)
    made.documents[0].write_text("<!-- table: m comparison over training -->\n<!-- end -->\n")
    rows = rows_of(made)
    assert [row[4] for row in rows[:2]] == ["mean over training / PPO's", "0.75 [0.75, 0.75]"]
    assert rows[3][2].startswith("0.75 [") and rows[3][4].startswith("0.00 [")  # with the reference's mean as 1
    made.documents[0].write_text("<!-- table: m comparison -->\n<!-- end -->\n")
    assert [row[4] for row in rows_of(made)[:2]] == ["final return / PPO's", "1.00 [1.00, 1.00]"]


def test_only_equal_steps_are_compared(made):
    put(made.results / "m" / "Task-v1", "ppo", 1, 100)
    put(made.results / "m" / "Task-v1", "a1", 1, 100, steps=500)
    assert ["Task-v1", "500", "A1", "1", "100", "100", "100"] in rows_of(made)
    assert "Nothing can be compared with PPO yet" in made.documents[0].read_text()


def test_contrasts_add_and_subtract_arms_of_one_matrix_or_two(made):
    """Of equally many steps, over all tasks on which every term has been run."""
    matrix, twin = made.matrices / "m.toml", made.matrices / "twin.toml"
    twin.write_text(MATRIX)
    contrasts = (
        '[contrasts]\n"A1 less PPO" = "a1 - ppo"\n"in both" = "a1 - ppo + twin/ppo - twin/a1"\n"not run" = "a1 - a2"\n'
    )
    matrix.write_text(MATRIX + contrasts)
    for seed in range(1, 6):
        for name, arm, level in (("m", "ppo", 100), ("m", "a1", 150), ("twin", "ppo", 10), ("twin", "a1", 20)):
            put(made.results / name / "Task-v1", arm, seed, level + 10 * seed)
        put(made.results / "m" / "other-Task-v1", "a1", seed, 1, steps=500)  # not as many steps as
        put(made.results / "m" / "other-Task-v1", "ppo", seed, 1)
    made.documents[0].write_text("<!-- table: m contrasts -->\n<!-- end -->\n")
    (_, pair, both) = rows_of(made)
    assert pair[:4] == ["A1 less PPO", "Task-v1", "1,000", "5, 5"] and pair[4].startswith("50.0 [26.9, 73.1")
    assert both[:4] == ["in both", "Task-v1", "1,000", "5, 5, 5, 5"] and both[4].startswith("40.0 [10.0, 70.0")
    for text in ("a1 -", "a1 ppo", "a1 - A2", "- - a1"):
        matrix.write_text(MATRIX + f'[contrasts]\nbad = "{text}"\n')
        with pytest.raises(SystemExit, match="is not of the form: arm - arm"):
            plot.main(made)
    matrix.write_text(MATRIX + '[contrasts]\nbad = "a1 - ppo + m/a1 - a2"\n')
    with pytest.raises(SystemExit, match="the contrast 'bad' names an arm twice"):
        plot.main(made)
    matrix.write_text(MATRIX + '[contrasts]\nbad = "a1 - twin/a7"\n')
    with pytest.raises(SystemExit, match="contrast of twin/a7, but no matrix twin has such an arm"):
        plot.main(made)


def test_thirds_stand_beside_the_references_end(made):
    steps = np.arange(1.0, 301)  # returns that are the step
    runs = {"T": {(300, arm): [plot.Run(arm, 1, 300, np.stack([steps] * 3, 1), None, "")] for arm in ("ppo", "a1")}}
    matrix = plot.read_matrix(made.matrices / "m.toml")
    # of steps 70 to 99, and 271 to 300
    assert plot.thirds_table(matrix, runs).endswith("| 84.5 | 286 | too few seeds |  |")


def test_thirds_are_tested_by_welch(made):
    for seed in range(1, 6):
        put(made.results / "m" / "Task-v1", "ppo", seed, 100 + seed)
        put(made.results / "m" / "Task-v1", "a1", seed, 90 + 3 * seed)
    made.documents[0].write_text("<!-- table: m thirds -->\n<!-- end -->\n")
    (row,) = rows_of(made)[1:]
    test = stats.ttest_ind(
        [90.5 + 3 * seed for seed in range(1, 6)], [100.5 + seed for seed in range(1, 6)], equal_var=False
    )
    assert row[2] == "A1" and row[5].startswith("-4.0 [") and float(row[6]) == pytest.approx(test.pvalue, abs=5e-4)


def test_interquartile_means_across_tasks_are_those_of_the_comparison(made):
    for task in ("Task-v1", "other-Task-v1"):
        for seed in range(1, 6):
            put(made.results / "m" / task, "ppo", seed, 100 + seed)
            put(made.results / "m" / task, "a1", seed, 120 + seed)
    page = made.documents[0]
    page.write_text(
        "<!-- table: m across tasks -->\n<!-- end -->\n<!-- table: m comparison over training -->\n<!-- end -->\n"
    )
    rows = rows_of(made)
    assert rows[1][:2] == ["A1", "Task-v1, other-Task-v1"] and rows[1] == rows[-1][:4]


def test_an_arm_can_be_the_beginning_of_the_longer_runs_of_another_matrix(made):
    made.matrices.joinpath("short.toml").write_text(
        MATRIX.replace("= 1000", "= 500") + 'beginning_of = "m"\n'  # of a2, the last arm
    )
    for seed in (1, 2, 6):  # the last is not among the seeds
        put(made.results / "m" / "Task-v1", "a2", seed, 100 * seed, late=True)
    put(made.results / "m" / "Task-v1", "a2", 3, 300, steps=400)  # not that far
    put(made.results / "short" / "Task-v1", "ppo", 1, 200, steps=500)
    made.documents[0].write_text("<!-- table: short -->\n<!-- end -->\n")
    rows = rows_of(made)
    assert rows[1:] == [
        ["Task-v1", "500", "PPO", "1", "200", "200", "200"],
        ["Task-v1", "500", "a2", "2", "96.4, 196", "96.5, 196", "not run"],  # the first half, 4 below the rest
    ]
    assert "Beginnings of the longer runs of the matrix m: a2." in made.documents[0].read_text()


def test_tasks_are_joined_by_the_seeds_that_finished_all_of_them(made):
    for task in ("Task-v1", "other-Task-v1"):
        for seed in (1, 2, 3):
            put(made.results / "m" / task, "ppo", seed, 100)
            if seed < 3 or task == "Task-v1":
                put(made.results / "m" / task, "a1", seed, 50)
    (row,) = (row for row in rows_of(made) if row[:2] == ["A1", "Task-v1, other-Task-v1"])
    too_few = "(too few seeds for an interval)"
    assert row[2:] == ["2 and 3", f"0.50 {too_few}", f"0.50 {too_few}", f"0.00 {too_few}", "1.00"]


def test_saturated_tasks_are_left_out_of_a_second_row(made):
    (made.matrices / "m.toml").write_text('saturated = ["other/Task-v1"]\n' + MATRIX)
    for seed in (1, 2, 3):
        for task, ours in (("Task-v1", 15.0), ("other-Task-v1", 10.0)):
            put(made.results / "m" / task, "ppo", seed, 10.0)
            put(made.results / "m" / task, "a1", seed, ours)
    across = [row for row in rows_of(made) if row[0] == "A1"]
    assert [(row[1], float(row[3].split()[0])) for row in across] == [
        ("Task-v1, other-Task-v1", pytest.approx((15.5 / 10.5 + 1) / 2, abs=0.01)),
        ("Task-v1", pytest.approx(15.5 / 10.5, abs=0.01)),
    ]


def test_agents_of_one_kind_have_one_colour_in_every_figure():
    matrices = [plot.read_matrix(path) for path in sorted((ROOT / "benchmark" / "matrices").glob("*.toml"))]
    colours = {}
    for matrix in (matrix for matrix in matrices if len(matrix.titles) < plot.MANY):
        styles = plot.line_styles(matrix)
        assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == len(matrix.titles)
        for arm, style in styles.items():
            colours.setdefault(matrix.titles[arm], set()).add(style["color"])
    kinds = "PPO", "SPRIG", "SPRIG's networks, joint loss", "SPRIG, value gradient to the leader"
    assert all(len(colours[kind]) == 1 for kind in kinds)
    assert len(set.union(*(colours[kind] for kind in kinds))) == len(kinds)


def test_arms_that_the_matrix_does_not_name_are_listed_and_not_drawn(made):
    put(made.results / "m" / "Task-v1", "ppo", 1, 100)
    put(made.results / "m" / "Task-v1", "extra", 1, 100)
    plot.main(made)
    assert "not part of the matrix: extra seed 1 (1,000 steps)" in made.documents[0].read_text()
    assert "extra" not in plot.description(made.results / "m.png")


# ---------------------------------------------------------------- what is committed


def test_committed_tables_and_figures_are_what_the_data_give(monkeypatch):
    monkeypatch.chdir(ROOT)
    plot.main(plot.Args(check=True))
    assert all(path.stat().st_size < 300_000 for path in (ROOT / "benchmark" / "results").glob("*.png"))


@pytest.fixture
def drawn(made):
    """Arguments to check two matrices, m and n, each with a page and a figure that are what its data give."""
    shutil.copy(made.matrices / "m.toml", made.matrices / "n.toml")
    pages = tuple(made.matrices.with_name(f"page_{name}.md") for name in "mn")
    for name, page in zip("mn", pages):
        page.write_text(f"<!-- table: {name} -->\n<!-- end -->\n\n<!-- table: {name} comparison -->\n<!-- end -->\n")
        for seed in (1, 2):
            for arm, level in (("ppo", 100), ("a1", 150)):
                put(made.results / name / "Task-v1", arm, seed, level + seed**2)
    made = dataclasses.replace(made, documents=pages)
    plot.main(made)
    return dataclasses.replace(made, check=True)


def forge_a_table(args):
    page = args.documents[0]
    page.write_text(page.read_text().replace("| 101, 104 |", "| 101, 105 |", 1))
    return {"page_m.md"}


def forge_a_game(args):
    path = args.results / "m" / "Task-v1" / "a1_seed2.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines[-1] = ",".join([*lines[-1].split(",")[:2], "99999", "1000"])
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return {"page_m.md", "m.png"}


def lose_a_figure(args):
    (args.results / "m.png").unlink()
    return {"m.png"}


@pytest.mark.parametrize("forge", [forge_a_table, forge_a_game, lose_a_figure])
def test_check_finds_what_was_tampered_with_and_writes_nothing_and_plot_mends_it(forge, drawn):
    plot.main(drawn)
    untouched = {path: path.read_bytes() for path in drawn.results.parent.rglob("*") if path.is_file()}
    stale = forge(drawn)
    before = {path: path.read_bytes() for path in drawn.results.parent.rglob("*") if path.is_file()}
    assert before != untouched
    with pytest.raises(SystemExit, match="^error: not what the data give: ") as stop:
        plot.main(drawn)
    assert set(re.findall(r"\w+\.(?:md|png)", str(stop.value))) == stale and "\n" not in str(stop.value)
    assert before == {path: path.read_bytes() for path in drawn.results.parent.rglob("*") if path.is_file()}
    plot.main(dataclasses.replace(drawn, check=False))
    plot.main(drawn)


def test_two_runs_write_the_same_bytes(made):
    for seed in (1, 2, 3):
        for arm, level in (("ppo", 100), ("a1", 150)):
            put(made.results / "m" / "Task-v1", arm, seed, level + seed**2)
    written = []
    for _ in range(2):
        plot.main(made)
        written.append([path.read_bytes() for path in (*made.documents, made.results / "m.png")])
        np.random.rand()  # noqa: NPY002 - which nothing may depend on
    assert written[0] == written[1]


def scale_rows(exponent):
    """Seconds 0.001 · size^exponent, operations ~ size, at three sizes; three rounds a tenth apart."""
    return [
        dict(
            zip(
                scale.COLUMNS, ("atari", "SPRIG", "minibatch", size, n, 1e-3 * size**exponent * (0.8 + n / 10), size, 7)
            )
        )
        for n in (1, 2, 3)
        for size in (16, 64, 256)
    ]


def write_csv(path, columns, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    path.with_suffix(".md").write_text("command and machine\n\nold\n")


def test_growth_is_the_exponent_of_a_power_law():
    assert scale.growth(np.array([1, 10, 100]), np.array([3, 300, 30000])) == pytest.approx((2, 3))
    cells = [cell.strip() for cell in scale.report(scale_rows(0.5), "").splitlines()[-1].strip("|").split("|")]
    assert cells[1:] == ["SPRIG", "16 to 256", "4 to 16", "0.50 (0.50)", "1.00 (1.00)", "7 to 7"]


def test_many_arms_get_a_row_each(made):
    """Of the longest runs alone; the row's line spans what the bootstrap says of its seeds."""
    matrix = made.matrices / "m.toml"
    matrix.write_text(MATRIX + "".join(f'[arms.b{i}]\ntitle = "B{i}"\n' for i in range(plot.MANY)))
    folder = made.results / "m" / "Task-v1"
    for seed in (1, 2, 3):
        put(folder, "ppo", seed, 10.0)
        put(folder, "b6", seed, 20.0 + 10 * seed)
        put(folder, "b6", seed + 10, 500.0, steps=500)
    plot.main(made)
    read = plot.read_matrix(matrix)
    figure = plot.draw(read, plot.read_runs(made.results / "m", read)[0], made.results)
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["PPO", "B6"]
    seeds, mean, span = (line.get_xdata() for line in axis.lines if line.get_ydata()[0] == 1)
    assert sorted(seeds) == [30.5, 40.5, 50.5] and np.ravel(mean) == [40.5]
    assert span[0] == pytest.approx(30.5) and span[1] == pytest.approx(50.5)
    assert plot.description(made.results / "m.png") == plot.describe(figure) and "B6" in plot.describe(figure)


def test_figure_of_growth_shows_every_point():
    small = [row | {scale.COLUMNS[1]: "PPO", scale.COLUMNS[-1]: 3} for row in scale_rows(0.5)]
    figure = scale.draw(small + scale_rows(0.5))
    for axis in figure.axes:
        for line in axis.lines:
            assert (np.asarray(line.get_ydata()) <= axis.get_ylim()[1]).all()


def test_tables_of_speed_and_growth_are_what_was_measured(made):
    names = ("stable-baselines3", "CleanRL", "ppo.py", "sprig.py")
    speeds = [(name, n, "steps per second", x * n) for n in (1, 2, 3) for name, x in zip(names, (100, 80, 200, 50))]
    speeds += [(name, n, "peak memory, MiB", 7) for n in (1, 2, 3) for name in names]
    clocked = [(name, "clocked", "share: leader", 0.5) for name in names[2:]]
    write_csv(made.results / "speed.csv", speed.COLUMNS, [*speeds, *clocked])
    write_csv(made.results / "scale.csv", scale.COLUMNS, [row.values() for row in scale_rows(0.5)])
    page = made.documents[0]
    page.write_text("<!-- table: speed -->\n<!-- end -->\n<!-- table: scale -->\n<!-- end -->\n")
    plot.main(made)
    for line in (
        "| ppo.py, steps/s | 400 | 200 | 600 |",
        "| PPO's steps per second over stable-baselines3's | 2.00 | 2.00 | 2.00 |",
        "| PPO's steps per second over CleanRL's | 2.50 | 2.50 | 2.50 |",
        "| SPRIG's time per step over PPO's | 4.00 | 4.00 | 4.00 |",
        "| share: leader | 50% | 50% |",
        "SPRIG | 16 to 256 | 4 to 16 |",
    ):
        assert line in page.read_text()
    assert "old" not in page.read_text() and (made.results / "scale.png").stat().st_size > 10_000
    for name in ("speed", "scale"):  # a number that is not what was measured is found, whatever the .md says
        path = made.results / f"{name}.csv"
        path.write_text((before := path.read_text()).replace(",7", ",8"))
        with pytest.raises(SystemExit, match="page.md"):
            plot.main(dataclasses.replace(made, check=True))
        path.write_text(before.replace("round", "turn"))
        with pytest.raises(SystemExit, match="has not the columns"):
            plot.main(dataclasses.replace(made, check=True))
        path.write_text(before)
        path.with_suffix(".md").write_text("")
        with pytest.raises(SystemExit, match=f"{name}.csv stands without {name}.md"):
            plot.main(dataclasses.replace(made, check=True))
        path.with_suffix(".md").write_text("`again`\n")


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--device", "tpu"], ["--point", "atari", "PPO", "foo", "4"]])
def test_growth_refuses_bad_input_in_one_line_and_writes_nothing(arguments, tmp_path):
    command = [sys.executable, "benchmark/scale.py", *arguments, "--output", str(tmp_path / "scale.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_point_of_growth_is_measured_on_the_real_step():
    command = [sys.executable, "benchmark/scale.py", "--threads", "1", "--point", "continuous", "SPRIG", "entries", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert 0 < measured["seconds"] < 10 and measured["megaflop"] > 1 and measured["peak memory, MiB"] > 0


def test_the_clock_tells_the_phases_apart():
    command = [sys.executable, "benchmark/speed.py", "--family", "continuous", "--threads", "1", "--steps", "2048"]
    command += ["--contestant", "sprig_continuous.py", "--clock"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    shares = {key.removeprefix("share: "): value for key, value in measured.items() if key.startswith("share: ")}
    assert min(shares[phase] for phase in ("emulator", "inference", "leader", "follower")) > 0.02
    assert shares["joint step"] == 0 and shares["other"] < 0.3
    step = {key: value for key, value in measured.items() if key.startswith("share of a gradient step: ")}
    assert any("mm" in key for key in step) and max(step.values()) < 0.9
    assert 0 < measured["steps/s if only gradient steps took time"] < measured["steps/s if only arithmetic took time"]
