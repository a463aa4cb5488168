"""How trained agents move on HalfCheetah: on their feet, or sliding along on their back.

    python benchmark/gait.py RUN_DIR ... --output benchmark/results/gait_halfcheetah.csv

The body's pitch is entry 1 of the observation; its cosine is negative where the back points down. Per run: the mean
return of so many whole games (actions sampled, as in evaluation; seeds of its own), and the share of their steps on the
back, over all games and in the game that has the least.
"""

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
from collect import fail
from probe import check, write_table

from watch import load_run

PITCH = 1  # entry of the observation


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


def main(settings: Args) -> None:
    check(settings, "games", "threads")
    torch.set_num_threads(settings.threads)
    rows = [["agent", "return", "steps on its back", "in the game with the fewest"]]
    write_table(rows + [move(run, settings) for run in settings.runs], settings.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
