"""Compare SPRIG and PPO on state vectors, from committed files: the table and the figure that README shows.

    python benchmark/continuous.py

Reads benchmark/results/continuous/<task>/*.csv (collect.py writes them); writes continuous.png beside that folder and
prints, per task, the return over the last 10 % of the steps, mean ± standard deviation over seeds, and over the tasks
that both scripts played on the same seeds and steps the interquartile mean of SPRIG's return relative to PPO's, with a
95 % interval by stratified bootstrap over seeds (Agarwal et al. 2021, arXiv 2108.13264).
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy.stats import trim_mean

PUBLISHED = {  # CleanRL's ppo_continuous_action on the v4 tasks, 1M steps
    "HalfCheetah-v5": "1442 ± 46",
    "Hopper-v5": "2382 ± 271",
    "Walker2d-v5": "2287 ± 571",
    "InvertedPendulum-v5": "963 ± 22",
}
SCRIPTS = {
    "ppo_continuous_baseline_default": ("PPO", "#1a5fb4"),
    "sprig_continuous_default": ("SPRIG", "#b3261e"),
}


@dataclass
class Args:
    results: Path = Path("benchmark/results")
    """folder with continuous/<task>/; continuous.png is written there"""
    final: float = 0.1
    """fraction of the steps whose episodes make the final score"""
    resamples: int = 10_000
    """bootstrap resamples"""
    seed: int = 0
    """seed of the bootstrap"""


def read_runs(folder: Path, script: str) -> dict[int, tuple[np.ndarray, np.ndarray, dict]]:
    """seed -> (agent steps, returns, record) of each run of a script on a task."""
    runs = {}
    for path in folder.glob(f"{script}_seed*.csv"):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        record = json.loads(path.with_suffix(".json").read_text())
        steps, returns = (np.array([float(row[key]) for row in rows]) for key in ("agent_steps", "episodic_return"))
        runs[record["arguments"]["seed"]] = (steps, returns, record)
    return dict(sorted(runs.items()))


def final_score(run: tuple[np.ndarray, np.ndarray, dict], fraction: float) -> float:
    steps, returns, record = run
    return float(returns[steps > (1 - fraction) * record["trained_steps"]].mean())


def relative_iqm(scores: dict[str, np.ndarray], rng: np.random.Generator, resamples: int) -> tuple[float, float, float]:
    """`scores`: task -> (2, seeds), PPO's and SPRIG's. IQM over runs of SPRIG / PPO's mean, and its 95 % interval."""

    def iqm(sample: dict[str, np.ndarray]) -> float:
        return trim_mean(np.concatenate([sprig / ppo.mean() for ppo, sprig in sample.values()]), 0.25)

    draws = []
    for _ in range(resamples):
        sample = {}
        for task, (ppo, sprig) in scores.items():  # stratified: seeds are drawn anew within each task and script
            sample[task] = [x[rng.integers(len(x), size=len(x))] for x in (ppo, sprig)]
        draws.append(iqm(sample))
    return iqm(scores), *np.quantile(draws, [0.025, 0.975])


def main(args: Args) -> None:
    tasks = sorted(path.name for path in (args.results / "continuous").glob("*") if path.is_dir())
    if not tasks:
        raise SystemExit(f"error: no runs in {args.results / 'continuous'}; benchmark/collect.py puts them there")
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.2 * len(tasks), 2.9), squeeze=False)
    print("| task | PPO | seeds | SPRIG | seeds | agent steps | CleanRL's PPO (v4) |")
    print("|-|-|-|-|-|-|-|")
    paired, left_out = {}, {}
    for axis, task in zip(axes[0], tasks):
        cells, scores, lengths = [], {}, set()
        for script, (name, colour) in SCRIPTS.items():
            runs = read_runs(args.results / "continuous" / task, script)
            scores[name] = {seed: final_score(run, args.final) for seed, run in runs.items()}
            lengths |= {run[2]["trained_steps"] for run in runs.values()}
            values = np.array(list(scores[name].values()))
            cells += [f"{values.mean():.0f} ± {values.std():.0f}" if len(values) else "not run", str(len(values))]
            for number, (steps, returns, record) in enumerate(runs.values()):
                edges = np.linspace(0, record["trained_steps"], 26)
                counts = np.histogram(steps, edges)[0]
                means = np.histogram(steps, edges, weights=returns)[0] / np.where(counts, counts, np.nan)
                axis.plot(edges[1:], means, color=colour, linewidth=1.2, alpha=0.7, label=None if number else name)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("agent steps", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        axis.spines[["top", "right"]].set_visible(False)
        steps = " and ".join(f"{length:,}" for length in sorted(lengths))
        print(f"| {task} | {' | '.join(cells)} | {steps} | {PUBLISHED.get(task, '')} |")
        common = sorted(scores["PPO"].keys() & scores["SPRIG"].keys())
        if not common or len(lengths) > 1:
            left_out[task] = "no common seeds" if not common else "runs of different lengths"
        elif np.mean([scores["PPO"][seed] for seed in common]) <= 0:
            left_out[task] = "PPO's return is not positive, so that a ratio says nothing"
        else:
            paired[task] = np.array([[scores[name][seed] for seed in common] for name in ("PPO", "SPRIG")])
    if paired:
        iqm, low, high = relative_iqm(paired, np.random.default_rng(args.seed), args.resamples)
        print(f"\nSPRIG relative to PPO on {', '.join(paired)}: {iqm:.2f} [{low:.2f}, {high:.2f}]")
    for task, reason in left_out.items():
        print(f"Not in the interquartile mean: {task} ({reason})")
    axes[0, 0].set_ylabel("episodic return", fontsize=8)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(args.results / "continuous.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
