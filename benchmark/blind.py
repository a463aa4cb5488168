"""What sight is worth in a game: the returns of players that see nothing, and of agents beside blind copies of them.

    python benchmark/blind.py --env-id BeamRiderNoFrameskip-v4   # players that hold one action, and one that draws it
    python benchmark/blind.py RUN_DIR ...                        # trained agents, each beside its blind copy

A blind copy draws its actions from the agent's mean probabilities, over all steps of the agent's games, whatever it
sees. If it scores what the agent does, within the error of so many games, nothing shows that perceiving was of use.

Of an agent's policy π, in nats: `entropy`, the mean of that of π(·|s) over these steps, and `information`, the entropy
of the mean probabilities less that: the mutual information of observation and action, 0 if they do not depend on it.

Actions must be choices. All games are whole and count, one environment each, as in the scripts' own evaluation. Runs
called <task>__<arm>__<seed>, as run.py calls them, make one row: mean ± standard deviation over their seeds.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro
from collect import fail
from probe import check, write_table

import ppo_atari_baseline
from watch import load_run


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=list)
    """run folders (none: players that hold one action, or draw it at random)"""
    env_id: str = "BeamRiderNoFrameskip-v4"
    """without runs: the Atari game, as in the scripts"""
    games: int = 30
    """whole games of each player"""
    seed: int = 0
    """seed of the games and actions"""
    threads: int = 2
    """CPU threads of emulator and networks"""
    output: Path | None = None
    """CSV to write as well; plot.py puts benchmark/results/blind*.csv into the documents"""


def play(script, args, seed: int, choose: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Raw returns and lengths (N,) of one whole game in each of `args.num_envs` environments.

    `choose` takes the observations (M, ...) of those still playing and gives their actions (M,) or (M, A).
    """
    envs = script.make_envs(args)
    seeds = script.env_seeds(seed, 3, num_envs=args.num_envs)  # stream 3: blind.py's and gait.py's alone
    obs, _ = envs.reset(seed=seeds)
    returns, lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=int)
    playing = np.ones(args.num_envs, dtype=bool)
    while playing.any():
        chosen = choose(obs[playing])
        actions = np.zeros((args.num_envs, *chosen.shape[1:]), dtype=chosen.dtype)  # a finished game idles
        actions[playing] = chosen
        obs, _, _, _, info = envs.step(actions)
        if "_episode" in info:
            ended = info["_episode"] & playing
            returns[ended], lengths[ended] = info["episode"]["r"][ended], info["episode"]["l"][ended]
            playing &= ~ended
    envs.close()
    return returns, lengths


def hold_each_action(settings: Args) -> list[list[str]]:
    """Rows of the table: what is held down (in the last row: drawn at each step), returns, lengths in agent steps."""
    script = ppo_atari_baseline
    args = script.Args(env_id=settings.env_id, num_envs=settings.games, threads=settings.threads)
    envs = script.make_envs(args)
    names = [action.name for action in envs.unwrapped.ale.get_action_set()]
    envs.close()
    draw = np.random.default_rng(settings.seed)
    players = {name: lambda obs, action=action: np.full(len(obs), action) for action, name in enumerate(names)}
    players["any at random"] = lambda obs: draw.integers(len(names), size=len(obs))
    rows = [["held down", "return", "lowest", "highest", "agent steps per game"]]
    for name, choose in players.items():
        returns, lengths = play(script, args, settings.seed, choose)
        rows.append([name, *(f"{x:.0f}" for x in (returns.mean(), returns.min(), returns.max(), lengths.mean()))])
        print(f"{name}: {returns.mean():.0f}", file=sys.stderr)
    return rows


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """In nats, along the last axis."""
    return torch.special.entr(probabilities).sum(-1)


def beside_its_blind_copy(run: Path, settings: Args) -> list[str]:
    """A row of the table: run, returns of both, entropy, information."""
    script, args, leader, follower, envs = load_run(run)
    envs.close()
    args = dataclasses.replace(args, num_envs=settings.games, threads=settings.threads)
    steps = []  # (M, A) probabilities of those playing

    @torch.inference_mode()
    def look(obs: np.ndarray) -> np.ndarray:
        policy = script.action_distribution(follower(leader(torch.from_numpy(obs)))[0])
        if not hasattr(policy, "probs"):
            fail(f"{run} was trained on actions that are no choices; a blind copy needs choices")
        steps.append(policy.probs)
        return script.sample(policy).numpy()

    torch.manual_seed(settings.seed)
    returns, _ = play(script, args, settings.seed, look)
    probabilities = torch.cat(steps)
    mean = probabilities.mean(0)
    copied, _ = play(script, args, settings.seed, lambda obs: mean.multinomial(len(obs), replacement=True).numpy())
    own = entropy(probabilities).mean()
    numbers = f"{returns.mean():.0f}", f"{copied.mean():.0f}", f"{own:.2f}", f"{(entropy(mean) - own).clamp_min(0):.2f}"
    print(f"{run}: {', '.join(numbers)}", file=sys.stderr)
    return [str(run), *numbers]


def main(settings: Args) -> None:
    check(settings, "games", "threads")
    torch.set_num_threads(settings.threads)
    if settings.runs:
        rows = [["agent", "return", "its blind copy's", "entropy", "mutual information"]]
        rows += [beside_its_blind_copy(run, settings) for run in settings.runs]
    else:
        rows = hold_each_action(settings)
    write_table(rows, settings.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
