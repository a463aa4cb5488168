"""Draw the BeamRider curves from committed files and print the table that README shows.

    python benchmark/plot.py

Reads benchmark/results/beamrider/*.csv and *.json (collect.py writes them) and the paper's digitised
Figure 2; writes benchmark/results/beamrider.png.
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

RANDOM_SCORE = 363.9  # a random agent on BeamRider (Mnih et al. 2015)
ARMS = {  # file name up to the seed -> (name, colour)
    "sprig_atari_default": ("SPRIG", "#b3261e"),
    "ppo_atari_baseline_default": ("PPO", "#1a5fb4"),
    "sprig_atari_literal": ("SPRIG, the paper read literally", "#8a6d00"),
}


@dataclass
class Args:
    results: Path = Path("benchmark/results")
    """folder with beamrider/ and figure2_beamrider.csv; beamrider.png is written there"""
    window: int = 50_000
    """agent steps that a point of a curve averages over"""
    final: float = 0.1
    """fraction of the steps whose games make the final score"""


def read_games(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return tuple(np.array([float(row[key]) for row in rows]) for key in ("agent_steps", "episodic_return"))


def curve(steps: np.ndarray, returns: np.ndarray, grid: np.ndarray, window: int) -> np.ndarray:
    """Mean return of the games that ended within the window before each point of the grid."""
    inside = (steps <= grid[:, None]) & (steps > grid[:, None] - window)  # (points, games)
    counts = inside.sum(1)
    return np.where(counts > 0, (inside * returns).sum(1) / np.maximum(counts, 1), np.nan)


def main(args: Args) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5))
    print("| | seeds | agent steps | return, last 10 % of training, per seed | evaluation, per seed |")
    print("|-|-|-|-|-|")
    longest = 0
    for arm, (name, colour) in ARMS.items():
        curves, finals, evaluations, trained = [], [], [], set()
        for path in sorted((args.results / "beamrider").glob(f"{arm}_seed*.csv")):
            steps, returns = read_games(path)
            record = json.loads(path.with_suffix(".json").read_text())
            total = record["trained_steps"]
            grid = np.arange(args.window, total + 1, args.window // 5)
            curves.append(curve(steps, returns, grid, args.window))
            axes.plot(grid, curves[-1], color=colour, alpha=0.3, linewidth=1)
            finals.append(returns[steps > (1 - args.final) * total].mean())
            result = record["evaluation"]
            evaluations.append(f"{result['mean']:.0f} ± {result['std']:.0f}" if result else "not run")
            trained.add(total)
        if not curves:
            continue
        shortest = min(map(len, curves))
        mean = np.mean([c[:shortest] for c in curves], axis=0)
        axes.plot(grid[:shortest], mean, color=colour, linewidth=2.2, label=f"{name} (n = {len(curves)})")
        longest = max(longest, *trained)
        finals = ", ".join(f"{x:.0f}" for x in finals)
        trained = " and ".join(f"{x:,}" for x in sorted(trained))
        print(f"| {name} | {len(curves)} | {trained} | {finals} | {', '.join(evaluations)} |")
    with open(args.results / "figure2_beamrider.csv") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    steps = np.array([float(row["environment_interactions"]) for row in rows])
    shown = steps <= max(longest, 400_000)
    for player, colour in (("sprig", "#b3261e"), ("ppo", "#1a5fb4")):
        values = np.array([float(row[f"{player}_mean"]) for row in rows])
        label = f"paper's Figure 2, {player.upper()} (digitised)"
        axes.plot(steps[shown], values[shown], color=colour, linestyle="--", linewidth=1.2, label=label)
    axes.axhline(RANDOM_SCORE, color="#777", linestyle=":", linewidth=1.2, label=f"random agent ({RANDOM_SCORE})")
    axes.set(xlabel="agent steps (of 4 frames)", ylabel="return of a whole game", xlim=(0, None))
    axes.set_title(f"BeamRiderNoFrameskip-v4, mean over the last {args.window // 1000}k steps", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
    figure.tight_layout()
    figure.savefig(args.results / "beamrider.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
