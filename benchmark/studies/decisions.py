"""Where the paper leaves a choice, measure it, on the patch task.

    python benchmark/studies/decisions.py > decisions.csv
    python benchmark/studies/decisions.py --variants "paper literal" --seeds 104

Table 1's settings but for the rollout (8 x 32) and γ = 0.5 (each step is a problem of its own), and features at unit
scale, which suits so short a task; SPRIG's default, 0.15, is a variant (row 11). A variant's score is the mean return
of all games played in training, as a fraction of the optimum: it rewards learning fast as well as well. Chance is
0.25. docs/paper.md has the table.
"""

import csv
import itertools
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (0, 1, 2)]

import tyro
from run import fail

VARIANTS = {
    "PPO, Nature CNN": None,
    "ladder 1: SPRIG's networks, joint PPO loss": {"update": "joint"},
    "ladder 2: 1, no value gradient to the encoder": {"update": "stopped"},
    "ladder 3: 2, a norm clip for each player": {"update": "separate"},
    "ladder 4: 3, the leader's own loss": {"update": "simultaneous"},
    "ladder 5: 4, the leader moves first (SPRIG)": {},
    "row 1: α on the cost": {"cooperation_weight": 0.3},
    "row 2: l1 cost": {"perception_cost": "l1"},
    "row 2: concentration cost": {"perception_cost": "concentration"},
    "row 2: entropy cost, λ_c = 1": {"perception_cost_weight": 1.0},
    "row 2: concentration cost, λ_c = 1": {"perception_cost": "concentration", "perception_cost_weight": 1.0},
    "row 4: no residual, no ReLU": {"attention": "figure4"},
    "row 4: no attention": {"attention": "none"},
    "row 5: log-prob objective": {"leader_objective": "log-prob"},
    "row 10: value gradient to the leader": {"leader_value_coef": 0.5},
    "row 11: features at 0.15": {"feature_scale": 0.15},
    "row 11: features at 0.15, joint PPO loss": {"feature_scale": 0.15, "update": "joint"},
    "paper literal": {"paper_literal": True},
}


@dataclass
class Args:
    variants: tuple[str, ...] = tuple(VARIANTS)
    """which to run"""
    seeds: tuple[int, ...] = (101, 102, 103)
    """tuning seeds"""
    steps: int = 2048
    """agent steps of each run"""
    threads: int = 0
    """CPU threads (0: all cores)"""


def score(variant: dict | None, seed: int, args: Args) -> float:
    from patch_task import PatchEnvs

    import ppo_atari_baseline
    import sprig_atari

    script = ppo_atari_baseline if variant is None else sprig_atari
    script.make_envs = lambda script_args, num_envs=None: PatchEnvs(num_envs or script_args.num_envs)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_steps": 32, "gamma": 0.5, "eval_episodes": 0, "device": "cpu", "threads": args.threads}
        settings |= {"seed": seed, "total_timesteps": args.steps, "run_dir": f"{folder}/run"}
        settings |= {} if variant is None else {"feature_scale": 1.0} | variant
        script.main(script.Args(**settings))
        with open(f"{folder}/run/episodes.csv", newline="") as file:
            returns = [float(row["episodic_return"]) for row in csv.DictReader(file)]
    return statistics.mean(returns) / PatchEnvs.optimum


def main(args: Args) -> None:
    if unknown := set(args.variants) - set(VARIANTS):
        fail(f"no variant {sorted(unknown)[0]!r}; there are: {', '.join(VARIANTS)}")
    if args.steps < 256 or args.steps % 256:
        fail(f"--steps {args.steps} is not a multiple of the rollout of 256 steps")
    if min(args.seeds) < 0 or not 0 <= args.threads <= 256:
        fail(f"--seeds {min(args.seeds)} or --threads {args.threads} is out of range")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["variant", "seed", "steps", "score"])
    for name, seed in itertools.product(args.variants, args.seeds):
        writer.writerow([name, seed, args.steps, f"{score(VARIANTS[name], seed, args):.4f}"])
        sys.stdout.flush()


if __name__ == "__main__":
    main(tyro.cli(Args, description="\n\n".join(__doc__.split("\n\n")[:2])))
