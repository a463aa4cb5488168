"""How agents move on HalfCheetah: on their feet, or sliding on their back.

    python benchmark/studies/gait.py RUN_DIR ... > gait.csv

The body's pitch is entry 1 of the observation; its cosine is negative where the back points down. Per run: the mean
return of so many whole games (actions sampled, as in evaluation; other seeds than evaluation's), and the share of
their steps on the back, over all games and in the game that has the least. An agent runs on its feet if it spends less
than half of its steps on its back.
"""

import csv
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (0, 1, 2)]

import torch
import tyro
from blind import load_run
from run import fail

PITCH = 1  # entry of the observation


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders, of HalfCheetah"""
    games: int = 10
    """whole games of each agent"""
    seed: int = 0
    """seed of the games and actions; a training's own seed would give the games of its evaluation"""


def move(run: Path, settings: Args) -> list[str]:
    """A row of the table."""
    script, args, leader, follower = load_run(run)
    if not args.env_id.startswith("HalfCheetah-"):
        fail(f"{run} was trained on {args.env_id}; what lies on its back is known of HalfCheetah alone")
    if args.observation_noise:
        fail(f"{run} was trained with --observation-noise; its pitch is not what it sees")
    args = dataclasses.replace(args, seed=settings.seed, eval_episodes=settings.games, eval_greedy=False)
    pitches = []  # (games,) at each step; all games are cut at the same one
    leader.register_forward_pre_hook(lambda module, inputs: pitches.append(inputs[0][:, PITCH]))
    played = script.evaluate(leader, follower, args)
    share = (torch.stack(pitches).cos() < 0).float().mean(0)  # (games,)
    numbers = f"{played['mean']:.0f}", f"{share.mean():.2f}", f"{share.min():.2f}"
    print(f"{run}: {', '.join(numbers)}", file=sys.stderr)
    return [str(run), *numbers]


def main(settings: Args) -> None:
    if settings.games < 1 or not 0 <= settings.seed < 2**32:
        fail(f"--games must be at least 1 and --seed in [0, 2³²), not {settings.games} and {settings.seed}")
    if not settings.runs:
        fail("no run is given")
    rows = [["agent", "return", "steps on its back", "in the game with the fewest"]]
    rows += [move(run, settings) for run in settings.runs]
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description="\n\n".join(__doc__.split("\n\n")[:2])))
