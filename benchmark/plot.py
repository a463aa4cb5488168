"""Redraw every table and figure of the results from committed data.

    python benchmark/plot.py            # figures, and the tables in README.md and docs/
    python benchmark/plot.py --check    # writes nothing; exit code 1 if a table or figure is not what the data give

Reads `<results>/<matrix>/<task>/<arm>_seed<n>.csv.gz` and `.json`, and from `<matrices>/<matrix>.toml` the question and
the arms' titles and order (the first is the reference). Writes `<results>/<matrix>.png` and `<results>/scale.png`, and
in the documents all that stands between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is

- a matrix (its scores), a matrix and "seeds" (every seed's final score), "comparison" (of final scores), "comparison
  over training" (of their means), "across tasks" (the latter's interquartile means), "contrasts" (sums and differences
  of arms that its `[contrasts]` name) or "thirds" (scores at a third of the steps);
- "runs": how much of each matrix has been run;
- "speed...", "scale...": what speed.py and scale.py left in NAME.csv, under the first line of NAME.md; with "summary"
  only the first table of it;
- "probe...", "blind...", "gait...", "decisions": what the programs of these names left in NAME.csv.

The same for every matrix:

- A curve has 100 points, each the mean return of the whole games that ended within the 10 % of the steps before it. The
  last one is the final score. The area under the curve, over its length, is the mean of the ten windows of 10 % that
  make up the training, of those in which a game ended ("mean over training").
- Every game counts once, however long it is, so that short games weigh more per step than long ones; and the curve of a
  task that is learnt early rises late, as short games from the beginning fill the first windows.
- From 7 arms on, whose curves would hide each other, a figure has a row per arm: its mean over training.
- Against time the same points stand at the seconds at which the run had come so far; a mean over seeds at their mean.
  Pauses of the process are left out (see `without_pauses`).
- Arms are judged by the final score. The mean over training, tested apart, is for tasks that have a highest return.
- Runs are compared at equal steps only: runs of another length are a row, a line and a comparison of their own. An arm
  with `beginning_of` is made of the longer runs of that matrix, cut at this one's steps, and has no evaluation.
- Under 3 seeds, single values and single lines; from 3 on, mean, standard deviation (n - 1) and 95 % intervals of
  means, ratios and what goes across tasks; from 5 on, those of differences and effects as well, and tests, two-sided,
  corrected after Holm over the arms of a task.
- On a single task, intervals of differences are Welch's, those of ratios Fieller's with Welch's degrees of freedom, so
  that they hold 1 where Welch's p, uncorrected, is above 0.05; those of Hedges' g are by noncentral t. Contrasts are
  Welch's, too, of any number of arms, and not corrected for their number.
- By bootstrap are bands of curves and the second part of a comparison, scores across tasks (or on one task, but with a
  zero). So few seeds make such intervals too narrow: of normal scores, one for a mean holds the truth in some 75 % of
  cases with 3 seeds and 85 % with 5, also over tasks, one for an interquartile mean over tasks in some 90 % with 5
  (tests/test_plot.py). Where a ratio has Fieller's as well, trust that one.
- A ratio has no interval where the reference's mean may be zero (see `ratio_interval` and `may_vanish`).
- Across tasks (Agarwal et al. 2021, arXiv 2108.13264): rliable's interquartile mean, probability of improvement and
  stratified bootstrap, over the seeds that an arm has on every task compared. Scores are scaled so that 1 is the
  reference's mean on the task and 0 a random agent's where it is known, else a return of 0; the reference's mean is
  drawn anew in every resample. The reference's own interquartile mean stands beside: it is not 1 if its scores are
  skewed. Tasks that the matrix calls `saturated`, since most seeds of every arm reach the highest return, pull an
  interquartile mean to 1 and narrow its interval: a second row leaves them out.
"""

import csv
import difflib
import gzip
import hashlib
import itertools
import json
import math
import re
import tomllib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import decisions
import gait
import numpy as np
import probe
import scale
import speed
import tyro
from collect import LABEL, fail, file_name, render
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from PIL import Image
from scipy import optimize, stats

POINTS = 100  # of a curve
WINDOW = 0.1  # fraction of a run's steps whose games make a point; the last point is the final score
FEW, TESTABLE = 3, 5  # seeds from which on there are intervals, and tests
MANY = 7  # arms whose curves would hide each other: each gets a row instead
SEEDS = 3  # arms up to which a figure has room for every seed's curve beside their mean,
ABREAST = 4  # and tasks, which are also how many stand in a row
RESAMPLES = 20_000  # with 2000 the ends of a wide interval hang on the random numbers
VANISHING = 0.001  # share of resamples with a reference at or below zero beyond which ratios to it have no interval
PERMUTATIONS = 9999  # at most: of more ways to part the seeds as many are drawn at random
SCORES = {"final": "final return", "area": "mean over training"}  # a run's, and what the tables call them
NO_INTERVAL = "(no interval)"
COLUMNS = ("agent_steps", "seconds", "episodic_return")
RANDOM = {"BeamRiderNoFrameskip-v4": 363.9}  # a random agent's return (Mnih et al. 2015)
PUBLISHED = {  # of PPO: what it is, and each source's return
    "BeamRiderNoFrameskip-v4": ("10M steps", {"PPO paper": 1590, "CleanRL": 1916, "baselines": 2643, "rl-zoo3": 3397}),
    "HalfCheetah-v5": ("1M steps, v4", {"CleanRL": 1442}),
    "Hopper-v5": ("1M steps, v4", {"CleanRL": 2382}),
    "Walker2d-v5": ("1M steps, v4", {"CleanRL": 2287}),
    "InvertedPendulum-v5": ("1M steps, v4", {"CleanRL": 963}),
}
LEVELS = ("headline", "beamrider", "beamrider-1m", "mujoco")  # matrices that show them: the tasks are undisturbed
# Matrices that show Figure 2, its task, and its column for each arm.
PAPER = (LEVELS[:3], "BeamRiderNoFrameskip-v4", {"ppo": "ppo_mean", "sprig": "sprig_mean"})
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")  # Okabe and Ito's
# Arms of the same kind have the same of these in every figure; other arms have what a figure leaves free.
KINDS = {"ppo": 0, "a0": 0, "sprig": 1, "a6": 1, "joint": 2, "a1": 2, "sprig-value": 3, "a6v": 3}
KINDS |= {"sprig-literal": 4, "a5": 4, "ppo-kl": 5, "a0k": 5}
GREY = "#666666"


@dataclass
class Args:
    results: Path = Path("benchmark/results")
    """folder with a folder per matrix; the figures are written there"""
    matrices: Path = Path("benchmark/matrices")
    """folder with a .toml file per matrix"""
    documents: tuple[Path, ...] = tuple(map(Path, ("README.md", "docs/paper.md", "docs/results.md", "docs/speed.md")))
    """files whose tables are written"""
    check: bool = False
    """write nothing; exit with 1 if a document's table or a figure differs from what the data give"""


@dataclass
class Matrix:
    name: str
    question: str
    tasks: list[str]  # as folders are called
    seeds: list[int]
    titles: dict[str, str]  # arm -> title; the first is the reference
    lengths: dict[str, int]  # arm -> agent steps asked for
    origins: dict[str, str]  # arm -> the matrix whose runs begin with it (see `beginning_of` in run.py)
    saturated: list[str]  # of the tasks, those on which most seeds of every arm reach the highest return
    contrasts: dict[str, list[tuple[int, str]]]  # title -> (sign, arm, or matrix/arm) of each term


@dataclass
class Run:
    arm: str
    seed: int
    steps: int  # agent steps trained
    games: np.ndarray  # (games, 3): COLUMNS of each whole game, in the order of their ends
    evaluation: float | None  # mean return of the final evaluation
    hardware: str

    def __post_init__(self) -> None:
        self.curve = curve(self.games[:, 0], self.games[:, 2], self.steps)  # (POINTS,)
        self.final = float(self.curve[-1])
        tenths = self.curve[POINTS // 10 - 1 :: POINTS // 10]  # their windows meet and do not overlap
        known = tenths[np.isfinite(tenths)]
        self.area = float(known.mean()) if len(known) else np.nan

    def beginning(self, steps: int) -> "Run":
        """What it was after so many steps. It was not evaluated then."""
        games = self.games[self.games[:, 0] <= steps]
        return Run(self.arm, self.seed, steps, games, None, self.hardware)


# ---------------------------------------------------------------- reading


def read_matrix(path: Path) -> Matrix:
    try:
        record = tomllib.loads(path.read_text())
        titles = {arm: settings.get("title", arm) for arm, settings in record["arms"].items()} | record.get("peers", {})
        flags = {arm: record.get("flags", {}) | settings.get("flags", {}) for arm, settings in record["arms"].items()}
        lengths = {arm: int(own.get("total-timesteps", 0)) for arm, own in flags.items()}
        lengths |= dict.fromkeys(record.get("peers", {}), int(record.get("flags", {}).get("total-timesteps", 0)))
        if not all(lengths.values()):
            raise ValueError("total-timesteps is not set for every arm")
        origins = {arm: own["beginning_of"] for arm, own in record["arms"].items() if "beginning_of" in own}
        tasks = [file_name(task) for task in record["tasks"]]
        saturated = [file_name(task) for task in record.get("saturated", [])]
        contrasts = {title: terms(text) for title, text in record.get("contrasts", {}).items()}
        seeds, question = record["seeds"], record["question"]
        return Matrix(path.stem, question, tasks, seeds, titles, lengths, origins, saturated, contrasts)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"{path} is no TOML file: {error}")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        fail(f"{path} is no matrix (question, tasks, seeds, an [arms.<label>] table per arm, ...): {error!r}")


def terms(text: str) -> list[tuple[int, str]]:
    """ "sprig - other/ppo" -> [(1, "sprig"), (-1, "other/ppo")]. Raises ValueError on anything else."""
    words, name = f"+ {text}".split(), "(WORD/)?WORD".replace("WORD", "[a-z0-9][a-z0-9-]*")
    if len(words) % 2 or not set(words[::2]) <= {"+", "-"} or not all(re.fullmatch(name, word) for word in words[1::2]):
        raise ValueError(f"contrast {text!r} is not of the form: arm - arm + matrix/arm")
    return [(1 if sign == "+" else -1, name) for sign, name in zip(words[::2], words[1::2])]


def read_run(path: Path) -> Run:
    """`path`: an <arm>_seed<n>.csv.gz with its .json beside it."""
    name = re.fullmatch(rf"({LABEL})_seed(\d+)\.csv\.gz", path.name)
    if name is None:
        fail(f"{path} is not called <arm>_seed<n>.csv.gz")
    arm, seed = name.groups()
    beside = path.with_name(f"{arm}_seed{seed}.json")
    try:
        with gzip.open(path, "rt", newline="") as file:
            games = np.array([[float(row[key]) for key in COLUMNS] for row in csv.DictReader(file)]).reshape(-1, 3)
        if not np.isfinite(games).all():
            fail(f"{path} holds a number that is not finite")
        record = json.loads(beside.read_text())
        hardware, evaluation = record["hardware"], record["evaluation"]
        machine = f"{hardware['cpu']}, {hardware['cores']} cores" + (f", {hardware['gpu']}" if hardware["gpu"] else "")
        mean = None if evaluation is None else float(evaluation["mean"])
        return Run(arm, int(seed), int(record["trained_steps"]), games, mean, machine)
    except FileNotFoundError:
        fail(f"{beside} is missing; benchmark/collect.py writes it beside the .csv.gz")
    except (OSError, EOFError, zlib.error, KeyError, TypeError, ValueError) as error:  # JSON's errors are ValueErrors
        fail(f"{path} or its .json is not what benchmark/collect.py writes: {error!r}")


def without_pauses(games: np.ndarray) -> np.ndarray:
    """(games,) seconds at which each game ended, as if the run had never been suspended.

    A minute or more between two rollouts' ends at less than a tenth of the run's median speed is taken for a pause, and
    replaced by what so many steps take at that speed; but not the first rollout, in which --compile makes the kernels.
    """
    times, last, inverse = np.unique(games[::-1, 1], return_index=True, return_inverse=True)
    steps, seconds = np.diff(games[::-1, 0][last], prepend=0), np.diff(times, prepend=0)  # of each rollout with games
    paces = seconds / steps.clip(1)  # seconds per step
    typical = np.median(paces) if len(paces) else 0.0
    paused = (seconds >= 60) & (paces > 10 * typical)
    paused[:1] = False
    return np.where(paused, typical * steps, seconds).cumsum()[inverse][::-1]


def read_runs(folder: Path, matrix: Matrix) -> tuple[dict[str, dict[tuple[int, str], list[Run]]], list[Run]]:
    """task -> (steps, arm) -> runs in the order of seeds; and the runs of arms that the matrix does not name.

    Tasks and arms stand in the matrix's order (tasks that it does not name: last), longer runs before shorter ones.
    """
    tasks = {path.name for path in folder.glob("*") if path.is_dir()}
    runs, others = {}, []
    for task in [*matrix.tasks, *sorted(tasks - set(matrix.tasks))]:
        groups = {}
        for arm, origin in matrix.origins.items():
            steps = matrix.lengths[arm]
            longer = map(read_run, folder.with_name(origin).joinpath(task).glob(f"{arm}_seed*.csv.gz"))
            begun = [run.beginning(steps) for run in longer if run.steps >= steps and run.seed in matrix.seeds]
            groups |= {(steps, arm): begun} if begun else {}
        for path in folder.joinpath(task).glob("*_seed*.json"):
            if not path.with_suffix(".csv.gz").exists():
                fail(f"{path.with_suffix('.csv.gz')} is missing; benchmark/collect.py writes it beside the .json")
        for run in map(read_run, folder.joinpath(task).glob("*.csv.gz")):
            if run.arm in matrix.titles and run.arm not in matrix.origins and run.seed in matrix.seeds:
                groups.setdefault((run.steps, run.arm), []).append(run)
            else:
                others.append(run)
        arms = list(matrix.titles)
        order = sorted(groups, key=lambda group: (-group[0], arms.index(group[1])))
        if order:
            runs[task] = {group: sorted(groups[group], key=lambda run: run.seed) for group in order}
    return runs, sorted(others, key=lambda run: (run.arm, run.seed))


# ---------------------------------------------------------------- statistics


def curve(steps: np.ndarray, returns: np.ndarray, total: int) -> np.ndarray:
    """(POINTS,): mean return of the games that ended in the window before each point; NaN where none did.

    `steps`, `returns` (games,): the agent step at which each game ended, and its return; `total`: steps in all.
    """
    grid = total * np.arange(1, POINTS + 1)[:, None] / POINTS
    inside = (steps <= grid) & (steps > grid - WINDOW * total)  # (points, games)
    counts = inside.sum(1)
    return np.where(counts > 0, (inside * returns).sum(1) / np.maximum(counts, 1), np.nan)


def interval(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> np.ndarray:
    """(2, ...): 95 % bootstrap interval; each of `samples` (..., n) is drawn anew along its last axis, apart."""
    rng = np.random.default_rng(0)
    draws = [sample[..., rng.integers(sample.shape[-1], size=(RESAMPLES, sample.shape[-1]))] for sample in samples]
    return np.nanquantile(statistic(*draws), [0.025, 0.975], axis=-1)


def may_vanish(reference: np.ndarray) -> bool:
    """Whether ratios to the mean of `reference` (n,) have no interval: too many resamples have it at or below zero,
    where a ratio changes its sign, so that the worst score would count as the best.
    """
    draws = np.random.default_rng(0).choice(reference, size=(RESAMPLES, len(reference)))
    return bool((draws.mean(-1) <= 0).mean() > VANISHING)


def ratio_interval(x: np.ndarray, reference: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the ratio of means (Fieller 1954), with Welch's variances and degrees of freedom: all ratios r
    for which the mean of x - r · reference is not significantly different from 0. None if the reference's mean is not
    significantly different from 0, as then any ratio may be.
    """
    a, b = (sample.var(ddof=1) / len(sample) for sample in (x, reference))
    if np.ptp(x) + np.ptp(reference) == 0:
        return (x.mean() / reference.mean(),) * 2
    freedom = (a + b) ** 2 / (a**2 / (len(x) - 1) + b**2 / (len(reference) - 1))
    t2, numerator, denominator = stats.t.ppf(0.975, freedom) ** 2, x.mean(), reference.mean()
    leading = denominator**2 - t2 * b
    if leading <= 0:
        return None
    # (numerator - r · denominator)² <= t² (a + r² b), a quadratic in r
    root = np.sqrt(t2 * (a * leading + b * numerator**2))
    return (numerator * denominator - root) / leading, (numerator * denominator + root) / leading


def contrast(samples: list[tuple[int, np.ndarray]]) -> tuple[float, float, float]:
    """Sum of the means of (sign, scores), half the width of its 95 % interval, and its two-sided p-value, all after
    Welch and Satterthwaite; NaN for both where nothing varies.
    """
    estimate = sum(sign * x.mean() for sign, x in samples)
    if not any(np.ptp(x) for _, x in samples):
        return estimate, np.nan, np.nan
    variances, degrees = np.array([(x.var(ddof=1) / len(x), len(x) - 1) for _, x in samples]).T
    error, freedom = np.sqrt(variances.sum()), variances.sum() ** 2 / (variances**2 / degrees).sum()
    return estimate, stats.t.ppf(0.975, freedom) * error, 2 * stats.t.sf(abs(estimate) / error, freedom)


def mean_difference(x: np.ndarray, reference: np.ndarray, axis: int = -1) -> np.ndarray:
    return x.mean(axis) - reference.mean(axis)


def pooled_deviation(x: np.ndarray, reference: np.ndarray) -> float:
    n, m = len(x), len(reference)
    return np.sqrt(((n - 1) * x.var(ddof=1) + (m - 1) * reference.var(ddof=1)) / (n + m - 2))


def hedges(x: np.ndarray, reference: np.ndarray) -> float:
    """Difference of means over the pooled standard deviation, with Hedges' correction for few samples."""
    correction = 1 - 3 / (4 * (len(x) + len(reference)) - 9)
    return correction * mean_difference(x, reference) / pooled_deviation(x, reference)


def hedges_interval(x: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """95 % interval of `hedges`, for normal samples of equal variance, by noncentral t (Hedges and Olkin 1985).

    The ends are the effects (without the correction) under which t would be no larger in 97.5 % and in 2.5 % of cases:
    SciPy's noncentral t fails far out, so its distribution is added up over 2000 quantiles of the pooled deviation.
    """
    n, m = len(x), len(reference)
    effect_per_t = np.sqrt(1 / n + 1 / m)
    t = mean_difference(x, reference) / effect_per_t / pooled_deviation(x, reference)
    spread = np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, n + m - 2) / (n + m - 2))
    reach = 10 + 4 * abs(t)
    low, high = (
        optimize.brentq(lambda shift, share=share: stats.norm.cdf(t * spread - shift).mean() - share, -reach, reach)
        for share in (0.975, 0.025)
    )
    return low * effect_per_t, high * effect_per_t


def permutation_test(x: np.ndarray, reference: np.ndarray) -> float:
    """Two-sided p-value of the difference of means: exact as long as there are at most PERMUTATIONS of the seeds."""
    options = {"vectorized": True, "n_resamples": PERMUTATIONS, "rng": np.random.default_rng(0)}
    return stats.permutation_test((x, reference), mean_difference, **options).pvalue


def holm(p: list[float]) -> np.ndarray:
    """p-values, adjusted for their number by Holm's step-down method."""
    p, order = np.asarray(p, float), np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]).clip(max=1)
    return adjusted


def relative_iqm(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Interquartile mean (...) of x over the reference's mean; scores (..., seeds, tasks), 0 at the zero of each task.

    Like the three below it is rliable's, for all resamples at once (tests/test_plot.py compares).
    """
    relative = x / reference.mean(-2, keepdims=True)
    scores = np.sort(relative.reshape(*relative.shape[:-2], -1))
    quarter = scores.shape[-1] // 4
    return scores[..., quarter : scores.shape[-1] - quarter].mean(-1)


def relative_mean(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """As above, the mean of all."""
    return (x / reference.mean(-2, keepdims=True)).mean((-2, -1))


def improvement(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(...): probability of improvement, P(x > reference) + P(equal) / 2 of two seeds, mean over tasks."""
    pairs = x[..., :, None, :] - reference[..., None, :, :]  # (..., seeds, seeds, tasks)
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean((-3, -2, -1))


def across_tasks(x: np.ndarray, reference: np.ndarray, statistic: Callable) -> tuple[float, float, float]:
    """Estimate and the ends of its 95 % interval by stratified bootstrap: in each task of (seeds, tasks) seeds anew."""
    rng = np.random.default_rng(0)
    draws = [
        scores[rng.integers(len(scores), size=(RESAMPLES, *scores.shape)), np.arange(scores.shape[1])]
        for scores in (x, reference)
    ]
    low, high = np.quantile(statistic(*draws), [0.025, 0.975])
    return float(statistic(x, reference)), float(low), float(high)


# ---------------------------------------------------------------- tables


def number(x: float | None) -> str:
    if x is None:
        return "not run"
    return "no game" if np.isnan(x) else f"{x:.0f}" if abs(x) >= 100 else f"{x:z.1f}"


def with_interval(estimate: float, half: float) -> str:
    return f"{number(estimate)} [{number(estimate - half)}, {number(estimate + half)}]"


def summary(values: list[float | None]) -> str:
    """Single values under FEW seeds, else mean ± standard deviation over the seeds that have one."""
    known = [x for x in values if x is not None and not np.isnan(x)]
    if len(known) < FEW:
        return ", ".join(map(number, values)) if known else number(values[0])
    cell = f"{number(np.mean(known))} ± {number(np.std(known, ddof=1))}"
    return cell if len(known) == len(values) else f"{cell} ({len(known)} of {len(values)} seeds)"


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def scores_table(matrix: Matrix, runs: dict, others: list[Run]) -> str:
    rows, machines = [], {}
    for task, groups in runs.items():
        for (steps, arm), group in groups.items():
            cells = [[getattr(run, key) for run in group] for key in ("final", "area", "evaluation")]
            rows.append([task, f"{steps:,}", matrix.titles[arm], len(group), *map(summary, cells)])
            for run in group:
                machines.setdefault(run.hardware, set()).add(arm)
    head = ["task", "agent steps", "arm", "seeds", "return, last 10 %", "mean over training", "evaluation"]
    where = [
        f"{machine} ({'; '.join(title for arm, title in matrix.titles.items() if arm in arms)})"
        for machine, arms in sorted(machines.items())
    ]
    where = where if len(machines) > 1 else list(machines)
    notes = [
        f"Over seeds: mean ± standard deviation; with fewer than {FEW} seeds the value of each.",
        f"Hardware: {'; '.join(where)}.",
    ]
    for origin in sorted(set(matrix.origins.values())):
        arms = "; ".join(matrix.titles[arm] for arm in matrix.origins if matrix.origins[arm] == origin)
        notes.append(f"Beginnings of the longer runs of the matrix {origin}: {arms}.")
    if others:
        listed = (f"{run.arm} seed {run.seed} ({run.steps:,} steps)" for run in others)
        notes.append(f"In the same folder, but not part of the matrix: {', '.join(listed)}.")
    return f"{render(head, rows)}\n\n{' '.join(notes)}"


def seeds_table(matrix: Matrix, runs: dict) -> str:
    """Each seed's final score, from the lowest to the highest: what a mean hides where seeds fall into two kinds."""
    rows = []
    for task, groups in runs.items():
        for (steps, arm), group in groups.items():
            finals = ", ".join(number(run.final) for run in sorted(group, key=lambda run: run.final))
            rows.append([task, f"{steps:,}", matrix.titles[arm], len(group), finals])
    return render(["task", "agent steps", "arm", "seeds", "return, last 10 %, of each, ascending"], rows)


def known_scores(group: list[Run], score: str) -> np.ndarray:
    """(seeds,) of the runs that have one: were evaluated, or ended a game in time."""
    scores = np.array([getattr(run, score) for run in group], float)  # None becomes NaN
    return scores[np.isfinite(scores)]


def compare(matrix: Matrix, runs: dict, score: str) -> list[list]:
    """A row for each arm and task, against the reference at equal steps; `score` as in SCORES."""
    reference, *arms = matrix.titles
    rows = []
    for task, groups in runs.items():
        tested = []  # rows of the task whose two p-values stand at the end, not yet corrected
        for (steps, arm), group in groups.items():
            if arm not in arms or (steps, reference) not in groups:
                continue
            x, base = (known_scores(g, score) for g in (group, groups[steps, reference]))
            seeds = min(len(x), len(base))
            if seeds == 0:
                continue
            ratio = "no ratio: the reference's return is not positive"
            if base.mean() > 0:
                ratio = f"{x.mean() / base.mean():.2f}"
                if seeds >= FEW:
                    ends = ratio_interval(x, base)
                    ratio += f" {NO_INTERVAL}" if ends is None else " [{:.2f}, {:.2f}]".format(*ends)
            row = [task, f"{steps:,}", matrix.titles[arm], f"{len(x)} and {len(base)}", ratio]
            row += [number(mean_difference(x, base)), *["too few seeds"] * 3]
            if seeds >= TESTABLE:
                row[6:] = ["no spread", 1.0 if x.mean() == base.mean() else np.nan, permutation_test(x, base)]
                if np.ptp(x) + np.ptp(base) > 0:  # a task with a highest return may be solved by every seed of both
                    difference, half, p = contrast([(1, x), (-1, base)])
                    low, high = hedges_interval(x, base)
                    row[5:8] = with_interval(difference, half), f"{hedges(x, base):z.2f} [{low:.2f}, {high:.2f}]", p
                tested.append(row)
            rows.append(row)
        for column in (7, 8):
            adjusted = iter(holm([row[column] for row in tested if not np.isnan(row[column])]))
            for row in tested:
                row[column] = "no spread" if np.isnan(row[column]) else p_value(next(adjusted))
    return rows


def aggregate(matrix: Matrix, runs: dict, score: str) -> tuple[list[list], list[str]]:
    """Per arm, a row across tasks, one without saturated ones if there are any; and tasks left out, with reasons."""
    reference, *arms = matrix.titles
    rows, left_out = [], []
    for arm in arms:
        scores = {}  # task -> seed -> score less the task's zero, of the arm and of the reference
        for task, groups in runs.items():
            lengths = [steps for steps, other in groups if other == arm and (steps, reference) in groups]
            if not lengths:
                continue
            pair = [groups[max(lengths), name] for name in (arm, reference)]
            zero = RANDOM.get(task, 0.0)
            known = [{run.seed: getattr(run, score) for run in g} for g in pair]
            pair = [{seed: x - zero for seed, x in g.items() if np.isfinite(x)} for g in known]
            if not all(pair) or np.mean(list(pair[1].values())) <= 0:
                left_out.append(
                    f"{task} ({matrix.titles[arm]}: {matrix.titles[reference]} has a mean that is not above zero)"
                )
            else:
                scores[task] = pair
        if not scores:
            continue
        shared = [sorted(set.intersection(*(set(pair[i]) for pair in scores.values()))) for i in (0, 1)]
        if not all(shared):
            left_out.append(f"{matrix.titles[arm]} (no seed that finished every task)")
            continue
        unsaturated = [task for task in scores if task not in matrix.saturated]
        for tasks in [list(scores)] + [unsaturated] * (0 < len(unsaturated) < len(scores)):
            x, base = (np.array([[scores[task][i][s] for task in tasks] for s in shared[i]]) for i in (0, 1))
            row = [matrix.titles[arm], ", ".join(tasks), f"{len(x)} and {len(base)}"]
            for statistic in (relative_iqm, relative_mean, improvement):
                if min(len(x), len(base)) < FEW:
                    row.append(f"{statistic(x, base):.2f} (too few seeds for an interval)")
                elif statistic is not improvement and any(map(may_vanish, base.T)):
                    row.append(f"{statistic(x, base):.2f} {NO_INTERVAL}")
                else:
                    row.append("{:.2f} [{:.2f}, {:.2f}]".format(*across_tasks(x, base, statistic)))
            rows.append([*row, f"{relative_iqm(base, base):.2f}"])
    return rows, left_out


def comparison_table(matrix: Matrix, runs: dict, score: str, aggregated: tuple[list[list], list[str]]) -> str:
    """What `compare` and `aggregate` say of a score."""
    reference = next(iter(matrix.titles.values()))
    rows = compare(matrix, runs, score)
    if not rows:
        return f"Nothing can be compared with {reference} yet: no arm was run on the same task for equally many steps."
    head = ["task", "agent steps", "arm", "seeds", f"{SCORES[score]} / {reference}'s", "difference"]
    text = render([*head, "Hedges' g", "Welch's p", "permutation p"], rows)
    seeds = {tuple(map(int, re.findall(r"\d+", row[3]))) for row in rows}
    rows, left_out = aggregated
    if rows:
        head = ["arm", "tasks", "seeds", "interquartile mean", "mean", f"probability of improvement over {reference}"]
        head.append(f"interquartile mean of {reference} itself")
        zeros = [f"{task} {RANDOM[task]}" for task in runs if task in RANDOM]
        zero = f"a random agent's ({', '.join(zeros)})" if zeros else "a return of 0"
        zero += ", elsewhere a return of 0" if 0 < len(zeros) < len(runs) else ""
        where = "Across tasks, where"
        if len(runs) == 1:
            where, head, rows = "Where", head[:1] + head[2:], [row[:1] + row[2:] for row in rows]
        text += f"\n\n{where} a score of 1 is {reference}'s mean and 0 is {zero}:\n\n{render(head, rows)}"
    text += f"\n\nIn brackets 95 % intervals; p-values are corrected after Holm; tests from {TESTABLE} seeds on."
    if max(map(min, seeds)) >= TESTABLE:
        n, m = max(seeds, key=min)
        floor = 2 / min(math.comb(n + m, n), PERMUTATIONS + 1)  # what was seen counts among those drawn
        floor = p_value(floor) if floor >= 0.001 else f"{floor:.4f}"
        text += f" Permutations of {n} and {m} seeds cannot give a p under {floor} before the correction."
    if NO_INTERVAL in text:
        text += f" No interval of a ratio where {reference}'s mean may be zero."
    return text + (f" Not in it: {', '.join(left_out)}." if left_out else "")


def contrast_cells(samples: list[tuple[int, np.ndarray]]) -> list[str]:
    """What `contrast` says, as two cells: the sum with its interval, and p."""
    if min(len(x) for _, x in samples) < TESTABLE:
        return ["too few seeds", ""]
    estimate, half, p = contrast(samples)
    return [number(estimate), "no spread"] if np.isnan(p) else [with_interval(estimate, half), p_value(p)]


def contrasts_table(matrix: Matrix, matrices: dict[str, Matrix], results: dict[str, dict]) -> str:
    """What the matrix's `[contrasts]` come to on each task, where all their terms have runs of equally many steps."""
    rows = []
    for title, parts in matrix.contrasts.items():
        names = [(name if "/" in name else f"{matrix.name}/{name}").split("/") for _, name in parts]
        if len(set(map(tuple, names))) < len(names):
            fail(f"matrix {matrix.name}: the contrast {title!r} names an arm twice; its terms must be independent")
        for origin, arm in names:
            if origin not in matrices or arm not in matrices[origin].titles:
                fail(f"matrix {matrix.name} has a contrast of {origin}/{arm}, but no matrix {origin} has such an arm")
        for task in matrix.tasks:
            found = []
            for origin, arm in names:
                groups = results.get(origin, {}).get(task, {})
                found.append({steps: group for (steps, other), group in groups.items() if other == arm})
            shared = set.intersection(*map(set, found))
            if not shared:
                continue
            groups = [group[max(shared)] for group in found]
            row = [title, task, f"{max(shared):,}", ", ".join(str(len(group)) for group in groups)]
            for score in ("final", "area", "evaluation"):
                samples = [known_scores(group, score) for group in groups]
                if all(map(len, samples)):
                    row += contrast_cells([(sign, x) for (sign, _), x in zip(parts, samples)])
                else:
                    row += ["not run" if score == "evaluation" else "no game", ""]
            rows.append(row)
    if not rows:
        return "Not run yet, or nothing to contrast."
    head = ["difference of means", "task", "agent steps", "seeds", "return, last 10 %", "p"]
    text = render([*head, "mean over training", "p", "evaluation", "p"], rows)
    return f"{text}\n\nIn brackets 95 % intervals; they and p are Welch's, not corrected for their number."


def thirds_table(matrix: Matrix, runs: dict) -> str:
    """Each arm at 33 % of its steps (games of the tenth of all steps before that, as in every point of a curve) beside
    the reference at the end of as many.
    """
    reference, rows = next(iter(matrix.titles)), []
    for task, groups in runs.items():
        for (steps, arm), group in groups.items():
            if arm != reference and (steps, reference) in groups:
                early = [run.curve[POINTS // 3 - 1] for run in group]
                late = [run.final for run in groups[steps, reference]]
                known = np.array(early)[np.isfinite(early)]
                tested = contrast_cells([(1, known), (-1, known_scores(groups[steps, reference], "final"))])
                rows.append([task, f"{steps:,}", matrix.titles[arm], summary(early), summary(late), *tested])
    if not rows:
        return "Not run yet."
    head = ["task", "agent steps", "arm", "return at a third of the steps"]
    return render([*head, f"{matrix.titles[reference]}'s at their end", "difference", "Welch's p, not corrected"], rows)


def across_table(matrix: Matrix, rows: list[list]) -> str:
    """The interquartile means over tasks alone, of the rows that `aggregate` makes of means over training."""
    reference = next(iter(matrix.titles.values()))
    head = ["arm", "tasks", "seeds", f"interquartile mean of mean over training / {reference}'s"]
    return render(head, [row[:4] for row in rows]) if rows else "Not run yet."


def runs_table(matrices: dict[str, Matrix], results: dict[str, dict]) -> str:
    """What each matrix asks, and how much of it has been run."""
    rows = []
    for matrix in matrices.values():
        done = 0
        for task, groups in results.get(matrix.name, {}).items():
            for (steps, arm), group in groups.items():  # a run ends at a whole number of rollouts
                if task in matrix.tasks and steps >= 0.95 * matrix.lengths[arm]:
                    done += len({run.seed for run in group} & set(matrix.seeds))
        planned = len(matrix.tasks) * len(matrix.seeds) * len(matrix.titles)
        length = " or ".join(f"{steps:,}" for steps in sorted(set(matrix.lengths.values())))
        rows.append([matrix.name, matrix.question, length, f"{done} of {planned}", f"`{command(matrix)}`"])
    return render(["matrix", "question", "agent steps", "runs done", "command"], rows)


def command(matrix: Matrix) -> str:
    return f"python benchmark/run.py benchmark/matrices/{matrix.name}.toml"


def arm_name(runs: str, matrices: dict[str, Matrix]) -> str:
    """The arm of runs/<matrix>/<task>__<arm> by its title, with the task; other names as they are."""
    match = re.fullmatch(r"runs/(.+)/(.+?)__(.+)", runs)
    title = match and match[1] in matrices and matrices[match[1]].titles.get(match[3])
    return f"{title} ({match[2]})" if title else runs


# ---------------------------------------------------------------- figures


def line_styles(matrix: Matrix) -> dict[str, dict]:
    """Of each arm. The reference lies above the others, which might hide it."""
    free = [kind for kind in reversed(range(len(COLOURS))) if kind not in map(KINDS.get, matrix.titles)]
    others, styles = itertools.product(("-", "--", ":"), free), {}
    for arm in matrix.titles:
        line, kind = ("-", KINDS[arm]) if arm in KINDS else next(others)
        styles[arm] = {"color": COLOURS[kind], "linestyle": line, "zorder": 2 + 0.1 * (not styles)}
    return styles


def draw_group(axis, group: list[Run], x: np.ndarray, style: dict, seeds: bool) -> None:
    """A line per seed if they are few, else their mean and its band, with or without `seeds`; x (POINTS, seeds)."""
    curves = np.array([run.curve for run in group])  # (seeds, points)
    if len(group) < FEW:
        axis.plot(x, curves.T, **style, linewidth=1.1)
        return
    if seeds:
        axis.plot(x, curves.T, **style, linewidth=0.6, alpha=0.45)
    x = x.mean(1)
    axis.plot(x, curves.mean(0), **style, linewidth=1.8)
    known = np.isfinite(curves).all(0)
    if known.any():
        band = np.full((2, POINTS), np.nan)  # open where a seed has no game to show
        band[:, known] = interval(lambda sample: sample.mean(-1), curves.T[known])
        axis.fill_between(x, *band, color=style["color"], alpha=0.12, linewidth=0)


def draw_paper(axis, path: Path, styles: dict[str, dict], total: float, unit: float) -> None:
    """The paper's two curves, as read off its Figure 2, up to `total` agent steps."""
    try:
        with open(path) as file:
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
        columns = {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}
        grid = np.append(np.arange(0, total, 200_000), total)
        for arm, column in PAPER[2].items():
            values = np.interp(grid, columns["environment_interactions"], columns[column])
            label = f"paper's {arm.upper()}, read off its Figure 2"
            style = {"color": styles[arm]["color"], "linestyle": (0, (4, 2))}
            axis.plot(grid / unit, values, **style, linewidth=1.4, label=label)
    except (OSError, KeyError, ValueError, IndexError) as error:
        fail(f"{path} is not the paper's digitised Figure 2: {error!r}")


def draw_levels(axis, task: str) -> None:
    """Published levels of PPO: a line where the curves' range allows it, and a note in a corner."""
    if task not in PUBLISHED:
        return
    setting, levels = PUBLISHED[task]
    low, high = axis.get_ylim()
    words = {True: [], False: []}  # in range or not
    for source, level in levels.items():
        words[low <= level <= high].append(f"{source} {level}")
        if low <= level <= high:
            axis.axhline(level, color=GREY, linewidth=0.8)
    notes = {"grey line": words[True], "not in range": words[False]}
    lines = [f"{note}: {', '.join(sources)}" for note, sources in notes.items() if sources]
    text = "\n".join([f"published PPO, {setting}", *lines])
    axis.annotate(text, (0.99, 0.01), xycoords="axes fraction", color=GREY, fontsize=7, ha="right", va="bottom")


def legend_columns(labels: list[str], width: float) -> int:
    """The most columns that fit into `width` inches at 8 points."""
    for columns in range(len(labels), 1, -1):
        rows = -(-len(labels) // columns)
        widest = [max(map(len, labels[i : i + rows])) for i in range(0, len(labels), rows)]
        if sum(0.055 * letters + 0.52 for letters in widest) < width:
            return len(widest)  # of the columns asked for some may stay empty
    return 1


def with_note(figure: Figure, note: str) -> Figure:
    figure.text(0.995, 0.003, note, fontsize=7, color=GREY, ha="right", va="bottom")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))  # room for it
    return figure


def draw_rows(matrix: Matrix, runs: dict) -> Figure:
    """A panel per task, a row per arm: the mean over training of each seed, and their mean with its interval."""
    played = {arm for groups in runs.values() for _, arm in groups}
    arms = [arm for arm in matrix.titles if arm in played]
    figure = Figure(figsize=(2.4 + 3.1 * len(runs), 0.9 + 0.22 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axis, (task, groups) in zip(panels, runs.items()):
        longest = max(steps for steps, _ in groups)
        for (steps, arm), group in groups.items():
            if steps != longest:
                continue
            row, areas = arms.index(arm), np.array([run.area for run in group])
            colour = COLOURS[KINDS[arm]] if arm in KINDS else GREY
            axis.plot(areas, np.full(len(areas), row), "|", color=GREY, markersize=5)
            axis.plot(areas.mean(), row, "o", color=colour, markersize=4)
            if len(group) >= FEW:
                axis.plot(interval(lambda sample: sample.mean(-1), areas), [row, row], color=colour, linewidth=1.8)
            if arm == arms[0]:
                axis.axvline(areas.mean(), color=GREY, linestyle=":", linewidth=1)
        axis.set_title(f"{task}, {longest:,} agent steps", fontsize=9)
        axis.set_xlabel("return of a whole game, mean over training", fontsize=8)
        axis.set_yticks(range(len(arms)), [matrix.titles[arm] for arm in arms])
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    note = "Seeds, their mean and its 95 % bootstrap interval; dotted: the first row's mean"
    return with_note(figure, note)


def draw(matrix: Matrix, runs: dict, results: Path) -> Figure:
    """Two panels per task: return against agent steps and against wall-clock time. For many arms see `draw_rows`."""
    if len(matrix.titles) >= MANY:
        return draw_rows(matrix, runs)
    tasks = list(runs)
    wide = len(tasks) == 1  # then its two panels stand side by side, else one above the other
    columns = 2 if wide else min(ABREAST, len(tasks))
    rows = 1 if wide else 2 * -(-len(tasks) // columns)
    size = (9.5, 4.2) if wide else (0.6 + 3.1 * columns, 0.7 + 2.5 * rows)
    figure = Figure(figsize=size, layout="constrained")  # without pyplot, which would keep it
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in () if wide else panels[-2:, len(tasks) % columns or columns :].flat:  # no task's
        panel.set_axis_off()
    styles, seeds = line_styles(matrix), len(matrix.titles) <= SEEDS and len(tasks) <= ABREAST
    counts = {arm: set() for arm in matrix.titles}  # numbers of seeds
    for i, (task, groups) in enumerate(runs.items()):
        row, column = 2 * (i // columns), i % columns
        left, right = panels[0] if wide else (panels[row, column], panels[row + 1, column])
        longest = max(steps for steps, _ in groups)
        unit, name = (1e6, "million agent steps") if longest >= 9e5 else (1e3, "thousand agent steps")
        times = {}  # (steps, arm) -> (POINTS, seeds): seconds at each point
        for key, group in groups.items():
            grid = key[0] * np.arange(1, POINTS + 1) / POINTS
            if all(len(run.games) for run in group):
                times[key] = np.array([np.interp(grid, run.games[:, 0], without_pauses(run.games)) for run in group]).T
            counts[key[1]].add(len(group))
            draw_group(left, group, np.tile(grid[:, None] / unit, len(group)), styles[key[1]], seeds)
        hours = max((time.max() for time in times.values()), default=0) > 2 * 3600
        for key, time in times.items():
            draw_group(right, groups[key], time / (3600 if hours else 60), styles[key[1]], seeds)
        if matrix.name in PAPER[0] and task == PAPER[1] and set(PAPER[2]) <= set(styles):
            draw_paper(left, results / "figure2_beamrider.csv", styles, longest, unit)
        for axis in (left, right):
            if task in RANDOM:
                axis.axhline(
                    RANDOM[task], color=GREY, linestyle=":", linewidth=1.4, label=f"random agent, {RANDOM[task]}"
                )
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
            axis.set_xlim(0, None)
        left.set_xlabel(name, fontsize=8)
        right.set_xlabel("hours of training" if hours else "minutes of training", fontsize=8)
        left.set_title(task, fontsize=9)
        if wide:
            right.set_title(f"{task}, against time", fontsize=9)
        if matrix.name in LEVELS:
            draw_levels(left, task)
    for panel in panels[:, 0]:
        panel.set_ylabel("return of a whole game", fontsize=8)
    shown = [arm for arm in matrix.titles if counts[arm]]
    numbers = ["–".join(str(n) for n in sorted({min(counts[arm]), max(counts[arm])})) for arm in shown]
    legend = {f"{matrix.titles[arm]} (seeds: {n})": Line2D([], [], **styles[arm]) for arm, n in zip(shown, numbers)}
    for panel in panels.flat:  # the paper's curves and a random agent's
        legend |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels()) if label not in legend}
    place = {"loc": "outside upper center", "fontsize": 8, "frameon": False}
    figure.legend(legend.values(), legend.keys(), ncols=legend_columns(list(legend), size[0]), **place)
    sizes = set.union(*counts.values())
    notes = [f"a line per seed (fewer than {FEW})"] * (min(sizes) < FEW)
    notes += [f"mean over seeds and 95 % bootstrap band{', thin: the seeds' * seeds}"] * (max(sizes) >= FEW)
    note = f"{' or '.join(notes)}; each point: games of the {WINDOW:.0%} of training before it".capitalize()
    return with_note(figure, note)


def describe(figure: Figure) -> str:
    """What a figure shows, as text: its words and a digest of each line's and band's data, to five digits."""
    parts = [text.get_text() for text in [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]]
    for axis in figure.axes:
        parts += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), *(text.get_text() for text in axis.texts)]
        if isinstance(axis.yaxis.get_major_locator(), FixedLocator):  # names, not numbers
            parts += [label.get_text() for label in axis.get_yticklabels()]
        drawn = [line.get_xydata() for line in axis.lines]
        drawn += [path.vertices for band in axis.collections for path in band.get_paths()]
        for data in drawn:
            text = " ".join(f"{value:.5g}" for value in np.ravel(data))
            parts.append(hashlib.sha256(text.encode()).hexdigest()[:16])
    return "\n".join(part.encode("ascii", "replace").decode() for part in parts if part)


def description(path: Path) -> str:
    """What `describe` said of a figure when it was saved."""
    try:
        with Image.open(path) as image:
            return image.info.get("Description", "")
    except OSError:
        return ""


# ---------------------------------------------------------------- documents


def fill(document: Path, tables: dict[str, str]) -> str:
    """The document's text with every table between its markers replaced."""
    try:
        text = document.read_text()
    except FileNotFoundError:
        fail(f"there is no {document}; run this from the repository's root")
    names = re.findall(r"<!-- table: (.+?) -->", text)
    for name in names:
        if name not in tables:
            near = difflib.get_close_matches(name, tables, n=5, cutoff=0.0)
            fail(f"{document} asks for the table {name!r}; of {len(tables)} tables the nearest are {', '.join(near)}")
    whole = re.compile(r"(<!-- table: (.+?) -->\n)((?:(?!<!-- table).)*?)(<!-- end -->)", re.S)
    if len(whole.findall(text)) != len(names):
        fail(f"{document}: a '<!-- table: ... -->' has no '<!-- end -->' before the next one")
    return whole.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n\n{match[4]}", text)


def main(args: Args) -> None:
    if not args.results.is_dir() or not args.matrices.is_dir():
        fail(f"there is no folder {args.results} or {args.matrices}; run this from the repository's root")
    matrices = {path.stem: read_matrix(path) for path in sorted(args.matrices.glob("*.toml"))}
    for folder in sorted({path.parents[1] for path in args.results.glob("*/*/*.csv.gz")}):
        if folder.name not in matrices:
            fail(f"{folder} has no {args.matrices / folder.name}.toml to say what its arms are")
    tables, figures, results = {}, {}, {}
    for name, matrix in matrices.items():
        runs, others = read_runs(args.results / name, matrix)
        compared = {"final": f"{name} comparison", "area": f"{name} comparison over training"}
        for table in (name, f"{name} seeds", f"{name} thirds", f"{name} across tasks", *compared.values()):
            tables[table] = f"Not run yet: `{command(matrix)}`."
        if runs:
            results[name] = runs
            tables[name] = scores_table(matrix, runs, others)
            tables[f"{name} seeds"] = seeds_table(matrix, runs)
            tables[f"{name} thirds"] = thirds_table(matrix, runs)
            aggregated = {score: aggregate(matrix, runs, score) for score in compared}
            tables[f"{name} across tasks"] = across_table(matrix, aggregated["area"][0])
            for score, table in compared.items():
                tables[table] = comparison_table(matrix, runs, score, aggregated[score])
            figures[args.results / f"{name}.png"] = draw(matrix, runs, args.results)
    tables |= {f"{name} contrasts": contrasts_table(matrix, matrices, results) for name, matrix in matrices.items()}
    tables["runs"] = runs_table(matrices, results)
    for path in sorted([*args.results.glob("speed*.csv"), *args.results.glob("scale*.csv")]):
        measured = speed if path.stem.startswith("speed") else scale
        rows = speed.read(path, measured.COLUMNS)
        try:
            head = path.with_suffix(".md").read_text().splitlines()[0]  # command, machine and versions
        except (FileNotFoundError, IndexError):
            fail(f"{path} stands without {path.with_suffix('.md').name}, whose first line says how it was measured")
        tables[path.stem] = measured.report(rows, head).strip()
        tables[f"{path.stem} summary"] = "\n\n".join(tables[path.stem].split("\n\n")[:2])  # its head and first table
        if measured is scale:
            figures[path.with_suffix(".png")] = scale.draw(rows)
    for path in sorted(path for program in ("probe", "blind", "gait") for path in args.results.glob(f"{program}*.csv")):
        rows = list(csv.reader(path.read_text().splitlines()))
        if len(rows) < 2 or len(set(map(len, rows))) > 1:
            fail(f"{path} is no table with a head and rows of equal length")
        head, *rows = gait.over_arms(rows) if path.stem.startswith("gait") else probe.over_seeds(rows)
        rows = [[arm_name(name, matrices), *cells] for name, *cells in rows]
        tables[path.stem] = render(head, rows)
    if (path := args.results / "decisions.csv").exists():
        tables[path.stem] = render(*decisions.report(path))
    texts = {document: fill(document, tables) for document in args.documents}  # everything, before anything is written
    if args.check:
        stale = [path for path, text in texts.items() if path.read_text() != text]
        stale += [path for path, figure in figures.items() if description(path) != describe(figure)]
        if stale:
            fail(f"not what the data give: {', '.join(map(str, stale))}; run python benchmark/plot.py and commit")
        print(f"{len(texts)} documents and {len(figures)} figures are what the data give")
        return
    for document, text in texts.items():
        document.write_text(text)
    for path, figure in figures.items():
        figure.savefig(path, dpi=110, metadata={"Description": describe(figure), "Software": None})
    print(f"written: {', '.join(map(str, [*texts, *figures]))}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
