"""Play CleanRL's PPO, unchanged, on a matrix that names it among its peers.

    python benchmark/studies/cleanrl.py MATRIX --clone CLONE --python PYTHON

CLONE is a clone of https://github.com/vwxyzjn/cleanrl, PYTHON an interpreter with what that asks for (it wants an older
Gymnasium than ours). Its ppo_atari.py plays beside the Atari scripts, its ppo_continuous_action.py beside the others:
every task and seed of the matrix that has no result yet, one after the other, for the matrix's steps, with one thread
and everything else as CleanRL sets it. What is interrupted begins anew: CleanRL saves nothing on the way. Results are
what benchmark/run.py exports, without an evaluation; `seconds` counts from the start of the program.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]

import tyro
from run import fail, hardware, load_matrix, plan_runs, result_path, write_result
from speed import CLEANRL_SCRIPTS, SIMULATOR
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LABEL = "cleanrl"  # of the peer
FRAME_SKIP = {"atari": 4, "continuous": 1}  # CleanRL's games of Atari count emulator frames
PREFIX = {"atari": "ale_py:", "continuous": ""}  # of a task's id: import ale_py


@dataclass
class Args:
    matrix: Annotated[Path, tyro.conf.Positional]
    """a matrix with a peer called cleanrl"""
    clone: Path
    """a clone of CleanRL"""
    python: str = sys.executable
    """the Python that runs it"""
    results: Path = Path("results")
    """where the results are written to"""


def output_of(command: list[str], **options) -> str:
    process = subprocess.run(command, capture_output=True, text=True, **options)
    if process.returncode:
        fail(f"CleanRL failed: {(process.stderr.strip() or 'no message').splitlines()[-1]}")
    return process.stdout


def play(args: Args, family: str, task: str, seed: int, steps: int) -> tuple[str, int]:
    """The games as an episodes.csv has them, and the agent steps trained."""
    command = [args.python, str(args.clone.absolute() / CLEANRL_SCRIPTS[family]), "--env-id", PREFIX[family] + task]
    command += ["--seed", str(seed), "--total-timesteps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        output_of(command, cwd=folder, env=environment)
        events = EventAccumulator(str(next(Path(folder, "runs").iterdir())), size_guidance={"scalars": 0})
        events.Reload()
    lines = ["agent_steps,seconds,episodic_return,episodic_length"]
    tags = ("charts/episodic_return", "charts/episodic_length")  # a short run may have none
    for score, length in zip(*(events.Scalars(tag) for tag in tags if tag in events.Tags()["scalars"])):
        numbers = score.step, round(score.wall_time - start, 1), f"{score.value:.7g}"
        lines.append(",".join(map(str, (*numbers, round(length.value / FRAME_SKIP[family])))))
    return "\n".join([*lines, ""]), events.Scalars("charts/SPS")[-1].step


def main(args: Args) -> None:
    if LABEL not in load_matrix(args.matrix)["peers"]:
        fail(f"{args.matrix} has no peer called {LABEL}")
    plan = plan_runs(args.matrix, Path("runs"), args.results)
    family = "atari" if "atari" in plan[0].script else "continuous"
    script = CLEANRL_SCRIPTS[family]
    if not (args.clone / script).is_file():
        fail(f"--clone {args.clone} is no clone of CleanRL: it has no {script}")
    if not (python := shutil.which(args.python)):
        fail(f"--python {args.python} is not a program")
    args = replace(args, python=os.path.abspath(python))  # it is started in another folder
    packages = ("torch", "gymnasium", "numpy", SIMULATOR[family], "stable-baselines3")
    ask = f"from importlib.metadata import version; print(*map(version, {packages}))"
    versions = dict(zip(packages, output_of([args.python, "-c", ask]).split(), strict=True))
    versions["script"] = hashlib.sha256((args.clone / script).read_bytes()).hexdigest()[:12]
    for task, seed, steps in dict.fromkeys((run.task, run.seed, run.values["total_timesteps"]) for run in plan):
        path = result_path(args.results, args.matrix.stem, task, LABEL, seed)
        if path.exists():
            continue
        games, trained = play(args, family, task, seed, steps)
        arguments = {"env_id": task, "seed": seed, "total_timesteps": steps}
        record = {"script": script, "arguments": arguments, "versions": versions}
        record |= {"hardware": hardware(gpu=False), "trained_steps": trained, "evaluation": None}
        write_result(path, games.encode(), record)
        print(f"{path}: {games.count(chr(10)) - 1} games in {trained} steps", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description="\n\n".join(__doc__.split("\n\n")[:2])))
