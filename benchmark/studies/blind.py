"""What sight is worth: players that see nothing, agents beside blind copies.

    python benchmark/studies/blind.py --env-id ID  # one action, or any
    python benchmark/studies/blind.py RUN_DIR ...  # agents, and copies

A blind copy draws its actions from the agent's mean probabilities, over all steps of the agent's games, whatever it
sees. If it scores what the agent does, within the error of so many games, nothing shows that perceiving was of use.

Of an agent's policy π, in nats: `entropy`, the mean of that of π(·|s) over these steps, and `information`, the entropy
of the mean probabilities less that: the mutual information of observation and action, 0 if they do not depend on it.

Actions must be choices. Games are whole and all of them count, as in the scripts' own evaluation, on other seeds.
"""

import csv
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]

import gymnasium as gym
import numpy as np
import torch
import tyro
from run import fail, load_script

import ppo_atari_baseline


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=list)
    """run folders (none: players that hold one action, or draw it at random)"""
    env_id: str = "BeamRiderNoFrameskip-v4"
    """without runs: the Atari game, as in the scripts"""
    games: int = 30
    """whole games of each player"""
    seed: int = 0
    """seed of the games and actions; a training's own seed would give the games of its evaluation"""


def load_run(run: Path):
    """(script, its arguments, leader, follower) of a run folder. Ends with one line if it is none."""
    try:
        name = json.loads((run / "args.json").read_text())["script"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run} is not the folder of a run: args.json: {error}")
    script = load_script(name, str(run))
    return script, *script.load_agent(run)


class Blind(torch.nn.Module):
    """A follower with the same logits (A,) whatever it is shown."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits.expand(len(features), -1), torch.zeros(len(features))


def hold_each_action(settings: Args) -> list[list]:
    """Rows of the table: what is held down (in the last row: drawn at each step), returns, lengths in agent steps."""
    script = ppo_atari_baseline
    args = script.Args(env_id=settings.env_id, seed=settings.seed, eval_episodes=settings.games)
    script.env_protocol(args)  # ends with one line if there is no such game
    game = gym.make(settings.env_id)
    count = int(game.action_space.n)
    names = game.unwrapped.get_action_meanings() if hasattr(game.unwrapped, "get_action_meanings") else range(count)
    held = {name: -1e9 * (torch.arange(count) != action).float() for action, name in enumerate(names)}
    rows = [["held down", "return", "lowest", "highest", "agent steps per game"]]
    for name, logits in (held | {"any at random": torch.zeros(count)}).items():
        played = script.evaluate(torch.nn.Identity(), Blind(logits), args)
        returns = np.array(played["returns"])
        numbers = returns.mean(), returns.min(), returns.max(), np.mean(played["lengths"])
        rows.append([name, *(f"{x:.0f}" for x in numbers)])
        print(f"{name}: {returns.mean():.0f}", file=sys.stderr)
    return rows


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """In nats, along the last axis."""
    return torch.special.entr(probabilities).sum(-1)


def beside_its_blind_copy(run: Path, settings: Args) -> list[str]:
    """A row of the table: run, returns of both, entropy, information."""
    script, args, leader, follower = load_run(run)
    args = dataclasses.replace(args, seed=settings.seed, eval_episodes=settings.games, eval_greedy=False)
    steps = []  # (games, A): the policy at each step

    def note(module, inputs, outputs):
        policy = script.action_distribution(outputs[0])
        if not isinstance(policy, torch.distributions.Categorical):
            fail(f"{run} was trained on actions that are no choices; a blind copy needs choices")
        steps.append(policy.probs)

    noting = follower.register_forward_hook(note)
    played = script.evaluate(leader, follower, args)
    noting.remove()
    probabilities = torch.stack(steps)  # (T, games, A)
    seen = torch.arange(len(steps))[:, None] < torch.tensor(played["lengths"])  # not where a game was over
    mean = probabilities[seen].mean(0)
    copied = script.evaluate(torch.nn.Identity(), Blind(mean.log()), args)
    own = entropy(probabilities[seen]).mean()
    information = (entropy(mean) - own).clamp_min(0)
    numbers = f"{played['mean']:.0f}", f"{copied['mean']:.0f}", f"{own:.2f}", f"{information:.2f}"
    print(f"{run}: {', '.join(numbers)}", file=sys.stderr)
    return [str(run), *numbers]


def main(settings: Args) -> None:
    if settings.games < 1 or not 0 <= settings.seed < 2**32:
        fail(f"--games must be at least 1 and --seed in [0, 2³²), not {settings.games} and {settings.seed}")
    if settings.runs:
        rows = [["agent", "return", "its blind copy's", "entropy", "mutual information"]]
        rows += [beside_its_blind_copy(run, settings) for run in settings.runs]
    else:
        rows = hold_each_action(settings)
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description="\n\n".join(__doc__.split("\n\n")[:2])))
