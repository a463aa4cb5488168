"""Where the paper leaves a choice, measure it: variants of SPRIG on the patch task (patch_task.py).

    python benchmark/decisions.py
    python benchmark/decisions.py --variants "paper literal" --seeds 101 102   # these anew, the rest stays

Table 1's settings but for the rollout (8 x 32) and γ = 0.5 (each step is a problem of its own), and features at unit
scale, which suits so short a task; SPRIG's default, 0.15, is a variant (row 11). A variant's score is the mean return
of all games played in training, as a fraction of the optimum: it rewards learning fast as well as well. Chance is
0.25. `python benchmark/plot.py` puts the table into docs/paper.md.
"""

import csv
import io
import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from collect import fail, write
from speed import check_output, read

COLUMNS = ("variant", "seed", "steps", "score")
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
    output: Path = Path("benchmark/results/decisions.csv")
    """one row per run"""


def score(variant: dict | None, seed: int, args: Args) -> float:
    from patch_task import PatchEnvs
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import ppo_atari_baseline
    import sprig_atari

    script = ppo_atari_baseline if variant is None else sprig_atari
    script.make_envs = lambda script_args: PatchEnvs(script_args.num_envs)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_steps": 32, "gamma": 0.5, "eval_episodes": 0, "device": "cpu", "threads": args.threads}
        settings |= {"seed": seed, "total_timesteps": args.steps, "run_dir": f"{folder}/run"}
        settings |= {} if variant is None else {"feature_scale": 1.0} | variant
        script.main(script.Args(**settings))
        events = EventAccumulator(f"{folder}/run", size_guidance={"scalars": 0})
        events.Reload()
        return statistics.mean(e.value for e in events.Scalars("charts/episodic_return")) / PatchEnvs.optimum


def read_scores(path: Path) -> list[dict]:
    """The rows of an earlier measurement. Ends with a one-line error if they are not of these variants."""
    rows = read(path, COLUMNS)
    if {row["variant"] for row in rows} - set(VARIANTS):
        fail(f"{path} is not a table of {', '.join(COLUMNS)} of today's variants; move it away and measure again")
    return rows


def read_rows(path: Path) -> dict[tuple[str, int], dict]:
    """(variant, seed) -> row of what has been measured."""
    return {(row["variant"], int(row["seed"])): row for row in read_scores(path)} if path.exists() else {}


def report(path: Path) -> tuple[list[str], list[list]]:
    """Head and rows of the table: each variant's scores by seed, their mean and, from 3 on, standard deviation."""
    scores = {}
    for row in read_scores(path):
        scores.setdefault(row["variant"], {})[int(row["seed"])] = float(row["score"])
    rows = []
    for variant, by_seed in scores.items():
        each = [by_seed[seed] for seed in sorted(by_seed)]
        mean = f"{statistics.mean(each):.2f}" + (f" ± {statistics.stdev(each):.2f}" if len(each) > 2 else "")
        rows.append([variant, ", ".join(map(str, sorted(by_seed))), ", ".join(f"{x:.2f}" for x in each), mean])
    return ["variant", "seeds", "score by seed", "mean"], rows


def main(args: Args) -> None:
    if unknown := set(args.variants) - set(VARIANTS):
        fail(f"no variant {sorted(unknown)[0]!r}; there are: {', '.join(VARIANTS)}")
    check_output(args.output, ".csv", "plot.py makes the table of it")
    rows = read_rows(args.output)
    if others := {row["steps"] for row in rows.values()} - {str(args.steps)}:
        fail(f"{args.output} holds scores after {min(others)} steps, not {args.steps}; name another --output")
    for name, seed in itertools.product(args.variants, args.seeds):
        result = score(VARIANTS[name], seed, args)
        rows = read_rows(args.output)  # again: another process may have measured other seeds meanwhile
        rows[name, seed] = dict(zip(COLUMNS, (name, seed, args.steps, f"{result:.4f}")))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows, key=lambda key: (list(VARIANTS).index(key[0]), key[1])))
        write(args.output, text.getvalue().encode())
        print(f"{name}, seed {seed}: {result:.2f}", flush=True)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(tyro.cli(Args, description=__doc__))
