"""Draw runs, or the repository's own results.

    python benchmark/plot.py RUN_DIR ...  # curves and a table of any runs
    python benchmark/plot.py --publish    # the repository's tables and figures
    python benchmark/plot.py --check      # exit code 1 if the data give others

A run is the folder that a script left (args.json, episodes.csv), finished or not, or an exported result
(`<label>_seed<n>.json` with its .csv.gz). A folder of such is all of them.

--publish reads benchmark/results, benchmark/matrices and benchmark/results/questions.toml, which says what is compared,
and writes what stands between `<!-- results: NAME -->` and `<!-- end -->`. A result that its matrix does not hold, or
with other flags, task or length, is refused by name.

A point of a curve is the mean return of the whole games that ended in the 10 % of the steps before it; the last one is
the final return. "Over training" is the mean of the run's ten windows. Differences: Welch's t test and its 95 %
interval. p-values of one row are corrected after Holm for all tests of that row. Several tasks: ratio of interquartile
means, each score first divided by the reference's mean on its task, and probability of improvement, with stratified
bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264), which 5 seeds make somewhat too narrow: unplanned ones get
no verdict. Counts: Fisher's exact test.
"""

import hashlib
import json
import re
import textwrap
import tomllib
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from rliable import library, metrics
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower

COLUMNS = ["agent_steps", "seconds", "episodic_return", "episodic_length"]
POINTS = 100  # of a curve
WINDOW = 10  # points whose steps make the window of one
SCORES = {"final": "last 10 %", "area": "over training", "evaluation": "evaluation"}
# Arguments that say where, how long and how observed a run is played, not what it learns.
NO_EFFECT = set("env_id seed run_dir device threads resume evaluate track checkpoint_interval".split())
NO_EFFECT |= set("eval_episodes eval_greedy total_timesteps compile".split())
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00"]  # Okabe and Ito's


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # run folders, exported results, or folders of them
    output: Path = Path("curves.png")  # figure of these runs
    publish: bool = False  # write the repository's own tables and figures
    check: bool = False  # say whether they are what the data give; write nothing
    root: Path = Path(__file__).resolve().parent.parent  # repository whose results are published


def fail(message: str):
    raise SystemExit(f"error: {message}")


# ---------------- Runs ----------------
@dataclass
class Run:
    path: Path
    script: str
    task: str
    seed: int
    arguments: dict
    games: pd.DataFrame  # COLUMNS of each whole game, in the order of their ends
    steps: int  # agent steps trained
    evaluation: float | None  # mean return of the final evaluation

    @cached_property
    def settings(self) -> dict:
        """What decides about learning: runs that agree in it, in script and task are seeds of one kind."""
        schedule = {"total_timesteps"} if self.arguments.get("anneal_lr") else set()
        return {name: value for name, value in self.arguments.items() if name not in NO_EFFECT - schedule}

    def curve(self, steps: int = 0) -> np.ndarray:
        """(POINTS,): mean return of the games that ended in the window before each point of `steps` (0: all that it
        trained); NaN where none did."""
        total, ends = steps or self.steps, self.games["agent_steps"].to_numpy()
        points = total * np.arange(1, POINTS + 1)[:, None] / POINTS
        inside = (ends <= points) & (ends > points - total * WINDOW / POINTS)  # (POINTS, games)
        counts = inside.sum(1)
        sums = inside @ self.games["episodic_return"].to_numpy()
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    def score(self, name: str, steps: int = 0) -> float:
        """`name`: a key of SCORES, after `steps` (0: all that it trained). NaN if there is none."""
        if name == "evaluation":
            return np.nan if self.evaluation is None else self.evaluation
        points = pd.Series(self.curve(steps))
        return float(points.iloc[-1] if name == "final" else points[WINDOW - 1 :: WINDOW].mean())


def read_run(path: Path) -> Run:
    """A run's folder, or the .json of an exported result. Ends the program with one line if it is neither."""
    exported = path.suffix == ".json"
    games_path = path.with_suffix(".csv.gz") if exported else path / "episodes.csv"
    try:
        record = json.loads((path if exported else path / "args.json").read_text())
        arguments, script = dict(record["arguments"]), Path(record["script"]).name
        games = pd.read_csv(games_path)[COLUMNS].astype(float)
        if exported:
            evaluation, steps = record["evaluation"], int(record["trained_steps"])
        else:
            report = path / "evaluation.json"
            evaluation = json.loads(report.read_text()) if report.exists() else None
            rollout, total = arguments["num_envs"] * arguments["num_steps"], arguments["total_timesteps"]
            last = int(games["agent_steps"].max()) if len(games) else 0
            steps = total // rollout * rollout if (path / "model.pt").exists() else last
        mean = None if evaluation is None else float(evaluation["mean"])
        run = Run(path, script, arguments["env_id"], int(arguments["seed"]), arguments, games, steps, mean)
    except FileNotFoundError as error:
        fail(f"{path} is no run: there is no {Path(error.filename).name}")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:  # JSON's and CSV's: ValueErrors
        fail(f"{path} is no run, or damaged: {type(error).__name__}: {' '.join(str(error).split())}")
    if not np.isfinite(games.to_numpy()).all():
        fail(f"{games_path} holds a number that is not finite")
    return run


def find_runs(paths: tuple[Path, ...]) -> list[Run]:
    found = []
    for path in paths:
        if not path.exists():
            fail(f"{path} does not exist")
        folder = path.is_dir() and not (path / "args.json").exists()
        below = {file.parent for file in path.rglob("args.json")} | set(path.rglob("*_seed*.json"))
        if folder and not below:
            fail(f"{path} is no run and holds none: no args.json, no <label>_seed<n>.json")
        found += sorted(below) if folder else [path]
    return [read_run(path) for path in dict.fromkeys(found)]


def usual(runs: list[Run], name: str) -> str:
    """The most frequent value of a setting, as text; the first of equally frequent ones."""
    return Counter(repr(run.settings[name]) for run in runs if name in run.settings).most_common(1)[0][0]


def group_runs(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """task -> label -> runs. A label is the script, and those flags that are not the usual ones on that task."""
    tasks = {}
    for run in runs:
        kin = [other for other in runs if (other.task, other.script) == (run.task, run.script)]
        flags = {name: value for name, value in run.settings.items() if repr(value) != usual(kin, name)}
        words = [
            run.script.removesuffix(".py"),
            *(f"--{name.replace('_', '-')} {flags[name]}" for name in sorted(flags)),
        ]
        tasks.setdefault(run.task, {}).setdefault(" ".join(words), []).append(run)
    return tasks


def number(x: float) -> str:
    return "0" if x == 0 else f"{x:z.0f}" if abs(x) >= 100 else f"{x:z.1f}" if abs(x) >= 10 else f"{x:z.2f}"


def summary(values) -> str:
    """Mean ± standard deviation of those that are known; of one or two their values."""
    known = [value for value in values if not np.isnan(value)]
    text = ", ".join(map(number, known)) or "none"
    if len(known) > 2:
        text = f"{number(np.mean(known))} ± {number(np.std(known, ddof=1))}"
    return text if len(known) in (0, len(values)) else f"{text} ({len(known)} of {len(values)} seeds)"


def draw_curves(tasks: dict[str, dict[str, list[Run]]], beside: dict[str, pd.Series] | None = None) -> Figure:
    """A panel per task: mean over seeds and its standard deviation. `beside`: label -> returns, by agent steps."""
    columns = len(tasks) if len(tasks) < 5 else 3
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(6.0, 3.2 * columns), 0.9 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    labels = list(dict.fromkeys(label for groups in tasks.values() for label in groups))
    handles = {}
    for panel, (task, groups) in zip(panels, tasks.items()):
        longest = max(run.steps for runs in groups.values() for run in runs)
        unit, name = (1e6, "million") if longest >= 9e5 else (1e3, "thousand")
        for label, runs in groups.items():
            index, steps = labels.index(label), min(run.steps for run in runs)  # as far as its shortest run
            returns = pd.DataFrame([run.curve(steps) for run in runs]).dropna(axis=1)  # (seeds, points)
            x, mean, spread = steps * (returns.columns + 1) / POINTS / unit, returns.mean(), returns.std().fillna(0)
            colour, dashes = COLOURS[index % len(COLOURS)], ["-", "--", ":"][index // len(COLOURS) % 3]
            handles[label] = panel.plot(x, mean, dashes, color=colour, linewidth=1.4)[0]
            panel.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        for (label, returns), colour in zip((beside or {}).items(), COLOURS):
            shown = returns[returns.index <= longest]
            handles[label] = panel.plot(shown.index / unit, shown, "--", color=colour, linewidth=1.0)[0]
        panel.set_title(task, fontsize=9)
        panel.set_xlabel(f"{name} agent steps", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    panels[0].set_ylabel("return of a whole game", fontsize=8)
    words = [textwrap.fill(label, 55) for label in handles]
    figure.legend(handles.values(), words, ncols=2, loc="outside upper center", fontsize=8)
    figure.supxlabel(
        "mean ± standard deviation over seeds; a point: the games of the 10 % of steps before it", fontsize=7
    )
    return figure


def draw_runs(args: Args) -> None:
    found = find_runs(args.runs)
    tasks = group_runs([run for run in found if len(run.games)])
    if not tasks:
        fail("none of these runs has a whole game yet: nothing to draw")
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        fail(f"--output {args.output} should end in .png, .pdf or .svg")
    rows = []
    for task, groups in tasks.items():
        for label, runs in groups.items():
            row = {"task": task, "runs of": label, "seeds": len(runs)}
            steps = [run.steps for run in runs]
            row["agent steps"] = " to ".join(f"{n:,}" for n in sorted({min(steps), max(steps)}))
            rows.append(row | {name: summary([run.score(score) for run in runs]) for score, name in SCORES.items()})
    print(pd.DataFrame(rows).to_string(index=False))
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(tasks).savefig(args.output, dpi=130)
    except OSError as error:
        fail(f"--output {args.output} cannot be written: {error.strerror}")
    print(f"curves: {args.output}; runs without a whole game yet: {sum(run.games.empty for run in found)}")


# ---------------- Matrices and their results ----------------
@dataclass
class Matrix:
    name: str
    tasks: list[str]
    seeds: list[int]
    steps: int
    titles: dict[str, str]  # label -> title, in the matrix's order
    scripts: dict[str, str]  # label -> script; of a label that someone else's script played there is none
    flags: dict[str, dict]  # label -> argument -> value
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)  # (task, label) -> of its seeds

    @property
    def missing(self) -> int:
        return len(self.tasks) * len(self.titles) * len(self.seeds) - sum(map(len, self.runs.values()))

    @property
    def horizon(self) -> str:
        return f"{self.steps / 1e6:.2g}M" if self.steps >= 1e6 else f"{self.steps / 1e3:.0f}k"


def read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {' '.join(str(error).split())}")


def read_matrix(path: Path, results: Path) -> Matrix:
    """A matrix and its results. Ends the program if one of these is not what the matrix asks for."""
    record = read_toml(path)
    try:
        arms, peers, common = record["arms"], record.get("peers", {}), record["flags"]
        titles = {label: arm["title"] for label, arm in arms.items()} | peers
        scripts = {label: Path(arm["script"]).name for label, arm in arms.items()}
        flags = {label: common | arm.get("flags", {}) for label, arm in arms.items()}
        steps, tasks, seeds = common["total-timesteps"], record["tasks"], record["seeds"]
    except (KeyError, TypeError, AttributeError) as error:
        fail(f"{path} is no matrix: {type(error).__name__}: {error}")
    matrix = Matrix(path.stem, tasks, seeds, steps, titles, scripts, flags)
    folders = {task.replace("/", "-").replace(":", "-"): task for task in tasks}
    for file in sorted((results / path.stem).rglob("*_seed*.*")):
        task, (label, _, end) = folders.get(file.parent.name), file.name.partition("_seed")
        if not task or label not in titles or end.partition(".")[0] not in map(str, seeds):
            fail(f"{file} is not in {path}, which names no such task, label or seed")
        if file.suffix == ".json":
            run = read_run(file)
            refuse_other(run, matrix, label, {"env_id": task, "seed": int(end.partition(".")[0])})
            matrix.runs.setdefault((task, label), []).append(run)
    for label in titles:
        refuse_odd([run for (_, other), runs in matrix.runs.items() if other == label for run in runs])
    return matrix


def refuse_other(run: Run, matrix: Matrix, label: str, wanted: dict) -> None:
    flags = matrix.flags.get(label, {"total-timesteps": matrix.steps}).items()
    wanted |= {name.replace("-", "_"): None if value == "None" else value for name, value in flags}
    for name in sorted(wanted.keys() & run.arguments.keys() - {"checkpoint_interval"}):
        if run.arguments[name] != wanted[name]:
            fail(f"{run.path} was played with {name} = {run.arguments[name]!r}; {matrix.name} has {wanted[name]!r}")
    if label in matrix.scripts and run.script != matrix.scripts[label]:
        fail(f"{run.path} is of {run.script}; {matrix.name} has {matrix.scripts[label]}")
    rollout = run.arguments.get("num_envs", 1) * run.arguments.get("num_steps", 2048)
    steps = wanted["total_timesteps"]
    if not 0 <= steps - run.steps < rollout:  # a run ends with its last whole rollout
        fail(f"{run.path} has {run.steps:,} agent steps; {matrix.name} has {steps:,}")


def refuse_odd(runs: list[Run]) -> None:
    """Ends the program if a run of a label has a setting that most of the others don't have."""
    for run in runs:
        for name, value in run.settings.items():
            if repr(value) != usual(runs, name):
                fail(f"{run.path} was played with {name} = {value!r}; its other seeds have {usual(runs, name)}")


# ---------------- Statistics ----------------
def welch(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Difference of means, its 95 % interval, two-sided p; NaN for these three where nothing varies."""
    result = {"difference": float(np.mean(x) - np.mean(y)), "low": np.nan, "high": np.nan, "p": np.nan}
    if np.ptp(x) > 0 or np.ptp(y) > 0:
        test = stats.ttest_ind(x, y, equal_var=False)
        result |= dict(zip(("low", "high"), map(float, test.confidence_interval()))) | {"p": float(test.pvalue)}
    return result


def across(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float, float]]:
    """(estimate, low, high) of the interquartile mean of x over that of y, and of the probability of improvement.

    `x`, `y`: (seeds, tasks), each score as a share of y's mean on its task, which every resample draws anew."""

    def both(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        ratio = metrics.aggregate_iqm(x / y.mean(0)) / metrics.aggregate_iqm(y / y.mean(0))  # y over itself is 1
        return np.array([ratio, metrics.probability_of_improvement(x, y)])

    np.random.seed(0)  # noqa: NPY002 - rliable 1.2 draws from it, whatever random_state it is given
    values, intervals = library.get_interval_estimates({"": [x, y]}, both, reps=2000)
    return [(float(value), *map(float, ends)) for value, ends in zip(values[""], intervals[""].T)]


def detectable(x: np.ndarray, y: np.ndarray) -> float:
    """True difference that so many seeds, with this spread, find in four of five cases (two-sided t test at 0.05)."""
    effect = TTestIndPower().solve_power(nobs1=len(x), ratio=len(y) / len(x), alpha=0.05, power=0.8)
    return float(effect * np.sqrt((np.var(x, ddof=1) + np.var(y, ddof=1)) / 2))


# ---------------- Tables and figures of the committed data ----------------
def markdown(rows: list[dict]) -> str:
    frame = pd.DataFrame(rows)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in [frame.columns, *frame.to_numpy()]]
    return "\n".join([lines[0], "|-" * len(frame.columns) + "|", *lines[1:]])


def short(task: str) -> str:
    return re.sub(r"(NoFrameskip)?-v\d+$", "", re.split("[/:]", task)[-1])


def p_value(p: float) -> str:
    return "no spread" if np.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def with_interval(value: float, low: float, high: float) -> str:
    return number(value) if np.isnan(low) else f"{number(value)} [{number(low)}, {number(high)}]"


class Published:
    """All tables and figures, by name."""

    def __init__(self, root: Path):
        self.results = root / "benchmark" / "results"
        paths = sorted(root.glob("benchmark/matrices/*.toml"))
        self.matrices = {path.stem: read_matrix(path, self.results) for path in paths}
        self.plan = read_toml(self.results / "questions.toml")
        for path in sorted(self.results.glob("*/*/*.json")):
            self.matrix(path.parents[1].name)

    def matrix(self, name: str) -> Matrix:
        if name not in self.matrices:
            fail(f"benchmark/results names a matrix {name}, but there is no benchmark/matrices/{name}.toml")
        return self.matrices[name]

    def tasks(self, entry: dict) -> list[str]:
        matrices = [self.matrix(name) for name in (entry["matrix"], *entry.get("also", []))]
        return entry.get("tasks") or list(dict.fromkeys(task for matrix in matrices for task in matrix.tasks))

    def scores(self, entry: dict, label: str, task: str) -> np.ndarray:
        """(seeds,): the scores of "label" or "matrix/label", or what a side file's column holds of it."""
        if "file" in entry:
            rows = pd.read_csv(self.results / entry["file"], index_col=0)
            names = rows.index.astype(str).str.replace(r"^.*__(.+)__\d+$", r"\1", regex=True)
            return rows.loc[names == label, entry["column"]].to_numpy(float)
        name, _, label = label.rpartition("/")
        places = [name or entry["matrix"], *entry.get("also", [])]
        runs = next(filter(None, (self.matrix(place).runs.get((task, label)) for place in places)), [])
        found = np.array([run.score(entry.get("score", "final"), entry.get("steps", 0)) for run in runs])
        if not len(found) or np.isnan(found).any():
            fail(f"questions.toml compares {places[0]}/{label} on {task}, of which a score is missing")
        return found

    def tests(self, entry: dict) -> pd.DataFrame:
        """All comparisons of an entry, a row each. p is NaN where nothing varies; it counts as 1 in the correction."""
        matrix, what, against = self.matrix(entry["matrix"]), entry["what"], entry["against"]
        labels = [label for label in matrix.titles if label != against] if what == ["*"] else what
        rows = []
        for task in self.tasks(entry):
            for label in labels:
                pair = {"x": self.scores(entry, label, task)}
                other = entry | {"steps": entry.get("steps_against", entry.get("steps", 0))}
                pair["y"] = self.scores(other, against, entry.get("task_against", task))
                rows.append({"task": task, "label": label} | pair | welch(**pair))
        frame = pd.DataFrame(rows)
        corrected = np.where(frame["p"].isna(), np.nan, multipletests(frame["p"].fillna(1), method="holm")[1])
        return frame.assign(corrected=corrected, planned=entry.get("planned", False), matrix=matrix)

    def forest(self, readme: bool = False) -> pd.DataFrame:
        """SPRIG over PPO, per task, of the matrices that are complete."""
        entries = [entry for entry in self.plan["forest"] if not self.matrix(entry["matrix"]).missing]
        entries = [entry for entry in entries if entry.get("readme") or not readme]
        return pd.concat([self.tests({"what": ["sprig"], "against": "ppo"} | entry) for entry in entries])

    def forest_table(self, readme: bool = False) -> str:
        rows = []
        for row in self.forest(readme).itertuples():
            seeds, ahead = row.matrix.seeds, metrics.probability_of_improvement(row.x[:, None], row.y[:, None])
            cells = {"task": short(row.task), "steps": row.matrix.horizon, "seeds": f"{seeds[0]} to {seeds[-1]}"}
            cells |= {"PPO": summary(row.y), "SPRIG": summary(row.x)}
            cells |= {"difference": with_interval(row.difference, row.low, row.high)}
            cells |= {"p": p_value(row.p).removeprefix("p = ")}
            cells |= {"SPRIG ahead": f"{ahead:.2f}", "detectable": number(detectable(row.x, row.y))}
            rows.append(cells | {"planned": "yes" if row.planned else "no"})
        return markdown(rows)

    def question(self, entry: dict) -> dict:
        cells = {"question": entry["ask"], "evidence": "", "effect": "", "planned": "no", "verdict": "open"}
        cells |= {"planned": "yes"} if entry.get("planned") else {}
        if "effect" in entry:  # written by hand
            return cells | {key: entry[key] for key in ("evidence", "effect", "verdict")}
        tasks = self.tasks(entry)
        names = [entry["matrix"], *entry.get("also", [])]
        names += [] if "file" in entry else [entry["against"].rpartition("/")[0] or entry["matrix"]]
        matrices = [self.matrix(name) for name in dict.fromkeys(names)]
        cells["evidence"] = entry.get("evidence", f"{', '.join(map(short, tasks))}; {matrices[0].horizon}")
        if missing := sum(matrix.missing for matrix in matrices):
            played = sum(len(runs) for matrix in matrices for runs in matrix.runs.values())
            return cells | {"effect": f"running: {played} of {played + missing} runs"}
        tests = self.tests(entry).sort_values("corrected", kind="stable")  # the clearest first
        x, y, p, sign = tests.iloc[0][["x", "y", "corrected", "difference"]]
        seeds = " and ".join(map(str, dict.fromkeys([len(x), len(y)])))  # once if they are equally many
        cells["evidence"] += f"; n = {seeds}{entry.get('note', '')}"
        if "below" in entry:
            (a, n), (b, m) = (((scores < entry["below"]).sum(), len(scores)) for scores in (x, y))
            p, sign = stats.fisher_exact([[a, n - a], [b, m - b]]).pvalue, a * m - b * n
            cells["effect"] = f"{a} of {n} against {b} of {m}, {p_value(p)}"
        elif entry.get("aggregate"):
            ratio, ahead = across(*(np.array([*tests[key]]).T for key in "xy"))
            cells["effect"] = f"× {with_interval(*ratio)}; ahead {with_interval(*ahead)}"
            if not entry.get("planned"):  # this interval is too narrow to judge what was seen first
                return cells | {"verdict": "not tested"}
            p, sign = float(ratio[1] <= 1 <= ratio[2]), ratio[0] - 1  # no p: the interval decides
        else:
            shown = tests[:1] if entry.get("strongest") else tests.sort_index()
            parts = "; ".join(self.effect(entry, test, len(tasks)) for _, test in shown.iterrows())
            cells["effect"] = f"of {len(tests)} the clearest: " * bool(entry.get("strongest")) + parts
        if not p < (0.05 if entry.get("planned") else 0.01):  # or NaN
            return cells | {"verdict": "not shown"}
        agrees = entry.get("claim") == "different" or (sign > 0) == (entry.get("claim", "more") == "more")
        where = f" on {short(tests.iloc[0].task)}" if len(tasks) > 1 and not entry.get("aggregate") else ""
        return cells | {"verdict": ("shown" if agrees else "refuted") + where}

    def effect(self, entry: dict, test: pd.Series, tasks: int) -> str:
        named = [test.matrix.titles[test.label]] if entry.get("named") else []
        named += [short(test.task)] if tasks > 1 else []
        share = f" ({test.difference / np.mean(test.y):+z.0%})" if np.mean(test.y) > 0 and "file" not in entry else ""
        share = share.replace("+0%", "0%")
        value = with_interval(test.difference, test.low, test.high)
        return f"{', '.join(named)}{': ' * bool(named)}{value}{share}, {p_value(test.corrected)}"

    def arms_table(self, name: str) -> str:
        """Scores of all labels of a matrix; p: of its clearest difference from the first, over training."""
        matrix = self.matrix(name)
        scores = [score for score in SCORES if score != "evaluation" or len(matrix.tasks) == 1]
        tests = self.tests({"matrix": name, "what": ["*"], "against": next(iter(matrix.titles)), "score": "area"})
        least = tests.groupby("label")["corrected"].min()
        rows = []
        for label, title in matrix.titles.items():
            cells = {f"n = {len(matrix.seeds)}, {matrix.horizon} steps": title}
            for task in matrix.tasks:
                for score in scores:
                    column = f"{short(task)}, {SCORES[score]}"
                    cells[column] = summary([run.score(score) for run in matrix.runs[task, label]])
            rows.append(cells | {"p": p_value(least[label]).removeprefix("p = ") if label in least else ""})
        return markdown(rows)

    def tables(self) -> dict:  # name -> function that makes it
        named = {"sprig-over-ppo": self.forest_table, "readme": lambda: self.forest_table(readme=True)}
        named |= {"questions": lambda: markdown([self.question(entry) for entry in self.plan["question"]])}
        return named | {f"arms {name}": lambda name=name: self.arms_table(name) for name in self.matrices}

    def figures(self) -> dict[str, Figure]:
        drawn = {"forest": self.draw_forest()}
        for name, matrices in self.plan["curves"].items():
            tasks = {}
            for matrix in map(self.matrix, matrices):
                order = list(matrix.titles)
                for (task, label), runs in sorted(matrix.runs.items(), key=lambda item: order.index(item[0][1])):
                    tasks.setdefault(task, {})[f"{matrix.titles[label]} ({len(runs)} seeds)"] = runs
            paper = pd.read_csv(self.results / "figure2_beamrider.csv", comment="#", index_col=0)
            beside = {f"{kind.upper()}, the paper's Figure 2": paper[f"{kind}_mean"] for kind in ("ppo", "sprig")}
            drawn |= {name: draw_curves(tasks, beside if name.startswith("beamrider") else None)} if tasks else {}
        return drawn

    def draw_forest(self) -> Figure:
        rows = self.forest()
        figure = Figure(figsize=(8.4, 1.3 + 0.34 * len(rows)), layout="constrained")
        axis = figure.subplots()
        names = []
        for height, row in enumerate(rows.itertuples()):
            scale = 100 / abs(np.mean(row.y))
            colour, marker = ("#d55e00", "D") if row.planned else ("#0072b2", "o")
            ends = [[scale * (row.difference - row.low)], [scale * (row.high - row.difference)]]
            axis.errorbar([scale * row.difference], [height], xerr=ends, fmt=marker, color=colour, markersize=6)
            seeds = f"seeds {row.matrix.seeds[0]} to {row.matrix.seeds[-1]}"
            names.append(f"{short(row.task)}, {row.matrix.horizon} steps, {seeds}")
        axis.set_yticks(range(len(rows)), names, fontsize=9)
        axis.invert_yaxis()
        axis.axvline(0, color="#555555", linewidth=1, linestyle=":")
        axis.set_xlabel("SPRIG's final return less PPO's, in % of PPO's absolute value", fontsize=9)
        axis.set_title("95 % intervals (Welch); orange diamonds: tests planned before the first run", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        return figure


# ---------------- Publishing ----------------
def digest(figure: Figure) -> str:
    """Of what a figure shows, words and numbers to four digits: the same where letters are drawn differently."""
    parts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axis in figure.axes:
        parts += [axis.get_title(), axis.get_xlabel(), *(label.get_text() for label in axis.get_yticklabels())]
        parts += [f"{line.get_color()} {line.get_marker()}" for line in axis.lines]
        drawn = [line.get_xydata() for line in axis.lines]
        drawn += [path.vertices for band in axis.collections for path in band.get_paths()]
        parts += [" ".join(f"{value:.4g}" for value in np.ravel(data)) for data in drawn]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def fill(document: Path, tables: dict) -> str:
    """The document's text with every table between its markers made anew."""
    text = document.read_text()
    pattern = re.compile(r"(<!-- results: (.+?) -->\n)(?:(?!<!-- results).)*?(<!-- end -->)", re.S)
    if len(pattern.findall(text)) != text.count("<!-- results: "):
        fail(f"{document}: a '<!-- results: ... -->' has no '<!-- end -->' before the next one")
    for _, name, _ in pattern.findall(text):
        if name not in tables:
            fail(f"{document} asks for the table {name!r}; there are {', '.join(tables)}")
    return pattern.sub(lambda match: f"{match[1]}\n{tables[match[2]]()}\n\n{match[3]}", text)


def publish(args: Args) -> None:
    """Writes what has changed; with --check says what would. figures.json holds what each figure shows, and its bytes'
    digest, since another machine may draw the same with other bytes."""
    published = Published(args.root)
    documents = [args.root / "docs" / "results.md", args.root / "README.md"]
    texts = {path: text for path in documents if (text := fill(path, published.tables())) != path.read_text()}
    record = published.results / "figures.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    figures = published.figures()
    paths = {name: published.results / f"{name}.png" for name in figures}
    stale = [name for name in figures if known.get(name) != [digest(figures[name]), file_digest(paths[name])]]
    names = ", ".join(str(path.relative_to(args.root)) for path in [*texts, *(paths[name] for name in stale)])
    if args.check and names:
        fail(f"not what the data give: {names}; run python benchmark/plot.py --publish")
    for path, text in texts.items():
        path.write_text(text)
    for name in stale:
        figures[name].savefig(paths[name], dpi=120, metadata={"Software": None})
        known[name] = [digest(figures[name]), file_digest(paths[name])]
    if stale:
        record.write_text(json.dumps({name: known[name] for name in figures}, indent=2) + "\n")
    print(f"written: {names}" if names else "tables and figures are what the data give")


def main(args: Args) -> None:
    if bool(args.runs) + args.publish + args.check != 1:
        fail("name runs to draw, or give --publish, or --check")
    (draw_runs if args.runs else publish)(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description="\n\n".join(__doc__.split("\n\n")[:2])))
