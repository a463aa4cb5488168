"""How trained agents move on HalfCheetah: on their feet, or sliding along on their back.

    python benchmark/gait.py RUN_DIR ... --output benchmark/results/gait_halfcheetah.csv

The body's pitch is entry 1 of the observation; its cosine is negative where the back points down. Per run: the mean
return of so many whole games (actions sampled, as in evaluation; seeds of its own), and the share of their steps on the
back, over all games and in the game that has the least. An agent runs on its feet if it spends less than half of its
steps on its back. How many of an arm's do is compared with the first arm's number: name that one's runs first.
"""

import csv
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro
from blind import play
from collect import fail, render
from probe import check, without_seed
from scipy import stats

from watch import load_run

PITCH = 1  # entry of the observation
HEAD = ["agent", "return", "steps on its back", "in the game with the fewest"]


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders, of HalfCheetah"""
    games: int = 10
    """whole games of each agent"""
    seed: int = 0
    """seed of the games and actions"""
    threads: int = 1
    """CPU threads of the networks"""
    output: Path | None = None
    """CSV to write as well"""


def move(run: Path, settings: Args) -> list[str]:
    """A row of the table."""
    script, args, leader, follower, envs = load_run(run)
    envs.close()
    if not args.env_id.startswith("HalfCheetah-"):
        fail(f"{run} was trained on {args.env_id}; what lies on its back is known of HalfCheetah alone")
    on_its_back = []  # per step: (games,), as all games are cut at the same step

    @torch.inference_mode()
    def look(obs: np.ndarray) -> np.ndarray:
        pitch = obs[..., PITCH].reshape(settings.games, -1)[:, 0]  # under noise there is a second row, the noise
        on_its_back.append(np.cos(pitch) < 0)
        return script.sample(script.action_distribution(follower(leader(torch.from_numpy(obs)))[0])).numpy()

    torch.manual_seed(settings.seed)
    returns, _ = play(script, dataclasses.replace(args, num_envs=settings.games), settings.seed, look)
    share = np.mean(on_its_back, axis=0)  # (games,)
    numbers = f"{returns.mean():.0f}", f"{share.mean():.2f}", f"{share.min():.2f}"
    print(f"{run}: {', '.join(numbers)}", file=sys.stderr)
    return [str(run), *numbers]


def report(rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table, a row per arm; Fisher's exact test, two-sided, not corrected for their number."""
    arms = {}
    for agent, episodic_return, share, _ in rows:
        arms.setdefault(without_seed(agent), []).append((float(share), float(episodic_return)))
    counts, table = {}, []
    for arm, agents in arms.items():
        feet, back = ([agent for agent in agents if (agent[0] < 0.5) == on_feet] for on_feet in (True, False))
        counts[arm] = len(feet), len(back)
        row = [arm, f"{len(feet)} of {len(agents)}"]
        for shares_and_returns in (feet, back):
            row += map(summary, zip(*shares_and_returns)) if shares_and_returns else ("", "")
        reference = next(iter(counts))
        p = stats.fisher_exact([counts[reference], counts[arm]])[1]
        table.append([*row, "" if arm == reference else "< 0.0001" if p < 1e-4 else f"{p:.2g}"])
    share, mean = "steps on the back", "return"
    by_gait = [f"{name}, {gait}" for gait in ("on their feet", "the others") for name in (share, mean)]
    return ["arm", "on their feet", *by_gait, "p against the first arm"], table


def summary(values: tuple[float, ...]) -> str:
    """Lowest to highest: shares with two digits, returns with none."""
    low, high = (f"{end:.0f}" if max(values) > 1 else f"{end:.2f}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def main(settings: Args) -> None:
    check(settings, "games", "threads")
    torch.set_num_threads(settings.threads)
    rows = [move(run, settings) for run in settings.runs]
    if settings.output:
        with settings.output.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])
    print(render(*report(rows)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
