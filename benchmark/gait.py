"""How trained agents move on HalfCheetah: on their feet, or sliding along on their back.

    python benchmark/gait.py RUN_DIR ... --output benchmark/results/gait_halfcheetah.csv

The body's pitch is entry 1 of the observation; its cosine is negative where the back points down. Per run: the mean
return of so many whole games (actions sampled, as in evaluation; other seeds than evaluation's), and the share of
their steps on the back, over all games and in the game that has the least. An agent runs on its feet if it spends less
than half of its steps on its back. How many of an arm's do is compared with the first arm's number: name that one's
runs first.
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
from probe import check, without_seed, write_table
from scipy import stats

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


def over_arms(rows: list[list[str]]) -> list[list[str]]:
    """The table with one row for all runs of an arm. Fisher's exact test, two-sided, not corrected for their number."""
    if len(rows[0]) != 4:
        fail("a table of gait.py has four columns")
    arms = {}
    for agent, episodic_return, share, _ in rows[1:]:
        arms.setdefault(without_seed(agent), []).append((float(share), float(episodic_return)))
    columns = [f"{who}: {what}" for who in ("those", "all others") for what in ("share of steps on the back", "return")]
    table, reference = [["arm", "agents on their feet", *columns, "Fisher's p against the first row"]], None
    for arm, agents in arms.items():
        by_gait = [[agent for agent in agents if (agent[0] < 0.5) == on_feet] for on_feet in (True, False)]
        counts = [len(group) for group in by_gait]
        ranges = [cell for group in by_gait for cell in (map(span, zip(*group), (2, 0)) if group else ("", ""))]
        p = "" if reference is None else f"{stats.fisher_exact([reference, counts])[1]:.2g}"
        reference = reference or counts
        table.append([arm, f"{counts[0]} of {len(agents)}", *ranges, p])
    return table


def span(values: tuple[float, ...], digits: int) -> str:
    """Lowest to highest."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def main(settings: Args) -> None:
    check(settings, "games", "threads")
    torch.set_num_threads(settings.threads)
    rows = [["agent", "return", "steps on its back", "in the game with the fewest"]]
    write_table(rows + [move(run, settings) for run in settings.runs], settings.output, over_arms)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
