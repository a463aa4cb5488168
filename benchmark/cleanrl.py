"""Play CleanRL's PPO, unchanged, where a matrix names it among its peers, and export its games.

    python benchmark/cleanrl.py benchmark/matrices/peer-atari.toml --cleanrl-clone CLONE --cleanrl-python PYTHON

CLONE is a clone of https://github.com/vwxyzjn/cleanrl, PYTHON an interpreter with what that asks for (it wants an older
Gymnasium than ours). Its ppo_atari.py plays beside the Atari scripts, its ppo_continuous_action.py beside the others:
every task and seed of the matrix that has no result yet, one after the other, for the matrix's steps, with one thread
and everything else as CleanRL sets it. What is interrupted begins anew: CleanRL saves nothing on the way. Results are
what benchmark/collect.py exports, without an evaluation; `seconds` counts from the start of the program.
"""

import dataclasses
import hashlib
import os
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro
from collect import fail, hardware, result_path, whole_games, write_result
from run import load_matrix
from speed import CLEANRL_SCRIPTS, find_cleanrl, output_of

LABEL = "cleanrl"  # of the peer
FRAME_SKIP = {"atari": 4, "continuous": 1}  # CleanRL's games of Atari count emulator frames
PREFIX = {"atari": "ale_py:", "continuous": ""}  # of a task's id: import ale_py
EMULATOR = {"atari": "ale-py", "continuous": "mujoco"}


@dataclass
class Args:
    matrix: Annotated[Path, tyro.conf.Positional]
    """a matrix with a peer called cleanrl"""
    cleanrl_clone: Path
    """a clone of CleanRL"""
    cleanrl_python: str = sys.executable
    """the Python that runs it"""
    tasks: tuple[str, ...] = ()
    """those of the matrix to play (default: all)"""
    seeds: tuple[int, ...] = ()
    """those of the matrix to play (default: all)"""
    results: Path = Path("benchmark/results")
    """where the results are written to"""


def play(args: Args, family: str, task: str, seed: int, steps: int) -> tuple[list[tuple], int]:
    """Games as (agent step, seconds, return, agent steps of the game), and the agent steps trained."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"--env-id": PREFIX[family] + task, "--seed": seed, "--total-timesteps": steps}
    command = [args.cleanrl_python, str(args.cleanrl_clone / CLEANRL_SCRIPTS[family])]
    command += [str(word) for flag in flags.items() for word in flag]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        output_of(command, "CleanRL", cwd=folder, env=environment)
        events = EventAccumulator(str(next(Path(folder, "runs").iterdir())), size_guidance={"scalars": 0})
        events.Reload()
        games = [
            (score.step, score.wall_time - start, score.value, length.value / FRAME_SKIP[family])
            for score, length in whole_games(events)
        ]
        return games, events.Scalars("charts/SPS")[-1].step


def main(args: Args) -> None:
    plan = load_matrix(args.matrix, Path("runs"), args.results)
    if LABEL not in tomllib.loads(args.matrix.read_text()).get("peers", {}):
        fail(f"{args.matrix} has no peer called {LABEL}")
    for flag, asked, known in (
        ("--tasks", args.tasks, {run.task for run in plan}),
        ("--seeds", args.seeds, {run.seed for run in plan}),
    ):
        if strange := set(asked) - known:
            fail(f"{flag} {min(strange)} is not one of {args.matrix}")
    family = "continuous" if "norm_obs" in plan[0].settings else "atari"
    clone, python = find_cleanrl(args.cleanrl_clone, args.cleanrl_python, family)
    args = dataclasses.replace(args, cleanrl_clone=clone, cleanrl_python=python)
    packages = ("torch", "gymnasium", "numpy", EMULATOR[family], "stable-baselines3")
    ask = f"from importlib.metadata import version; print(*map(version, {packages}))"
    versions = dict(zip(packages, output_of([python, "-c", ask], "--cleanrl-python").split(), strict=True))
    script = CLEANRL_SCRIPTS[family]
    versions["script"] = hashlib.sha256((clone / script).read_bytes()).hexdigest()[:12]
    steps = {
        (run.task, run.seed): run.arguments["total_timesteps"]
        for run in plan
        if (not args.tasks or run.task in args.tasks) and (not args.seeds or run.seed in args.seeds)
    }
    for (task, seed), total in steps.items():
        path = result_path(args.results, args.matrix.stem, task, LABEL, seed)
        if path.exists():
            continue
        games, trained = play(args, family, task, seed, total)
        arguments = {"env_id": task, "seed": seed, "total_timesteps": total}
        record = {"script": script, "arguments": arguments, "versions": versions}
        record |= {"hardware": hardware(gpu=False), "trained_steps": trained, "evaluation": None}
        write_result(path, games, record)
        print(f"{path}: {len(games)} games in {trained} steps", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
