"""Steps per second of both scripts and of stable-baselines3's PPO, at Table 1's settings, measured in turn.

    python benchmark/speed.py

Each round trains each of the three for `steps` agent steps on BeamRider, in a process of its own, so that a
machine whose speed drifts slows all of them; ratios are taken within a round and their median reported.
Start-up is not counted. stable-baselines3 plays through its own Atari wrappers (8 environments in one process,
its default).
"""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro

CONTESTANTS = ("stable-baselines3", "ppo_atari_baseline.py", "sprig_atari.py")


@dataclass
class Args:
    rounds: int = 5
    """rounds; each trains every contestant once"""
    steps: int = 4096
    """agent steps per contestant and round"""
    threads: int = 2
    """CPU threads of the networks and of the emulator"""
    output: Path = Path("benchmark/results/speed.md")
    """the table, in Markdown"""
    contestant: Literal["all", "stable-baselines3", "ppo_atari_baseline.py", "sprig_atari.py"] = "all"
    """run this one once in this process and print its steps per second"""


def stable_baselines3(args: Args) -> float:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    import ppo_atari_baseline

    torch.set_num_threads(args.threads)
    table1 = ppo_atari_baseline.Args()
    model = PPO(
        "CnnPolicy",
        VecFrameStack(make_atari_env("BeamRiderNoFrameskip-v4", n_envs=table1.num_envs, seed=0), 4),
        n_steps=table1.num_steps,
        batch_size=table1.minibatch_size,
        n_epochs=table1.update_epochs,
        learning_rate=table1.learning_rate,
        ent_coef=table1.ent_coef,
        vf_coef=table1.vf_coef,
        device="cpu",
    )
    start = time.perf_counter()
    model.learn(args.steps)
    return args.steps / (time.perf_counter() - start)


def ours(name: str, args: Args) -> float:
    import importlib

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script = importlib.import_module(Path(name).stem)
    settings = {"device": "cpu", "threads": args.threads, "total_timesteps": args.steps, "eval_episodes": 0}
    with tempfile.TemporaryDirectory() as folder:
        script.main(script.Args(run_dir=f"{folder}/run", **settings))
        events = EventAccumulator(f"{folder}/run")
        events.Reload()
        return events.Scalars("charts/SPS")[-1].value


def measure(name: str, args: Args) -> float:
    """Steps per second of one contestant, in a fresh process."""
    command = [sys.executable, __file__, "--contestant", name]
    command += ["--steps", str(args.steps), "--threads", str(args.threads)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return float(output.split()[-1])


def main(args: Args) -> None:
    if args.contestant != "all":
        speed = stable_baselines3 if args.contestant == CONTESTANTS[0] else lambda a: ours(a.contestant, a)
        print(speed(args))
        return
    speeds = {name: [] for name in CONTESTANTS}
    for _ in range(args.rounds):
        for name in CONTESTANTS:
            speeds[name].append(measure(name, args))
            print(f"{name}: {speeds[name][-1]:.0f} steps/s", file=sys.stderr)
    reference, ppo, sprig = speeds.values()
    ratios = {
        "PPO's steps per second over stable-baselines3's": [a / b for a, b in zip(ppo, reference)],
        "SPRIG's time per step over PPO's": [a / b for a, b in zip(ppo, sprig)],
    }
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "ale-py", "gymnasium", "stable-baselines3"))
    lines = [
        f"`python benchmark/speed.py --rounds {args.rounds} --steps {args.steps} --threads {args.threads}` on "
        f"{cpu_model()} ({platform.machine()}), Python {platform.python_version()}, {packages}.",
        "",
        f"| | median of {args.rounds} | lowest | highest |",
        "|-|-|-|-|",
    ]
    for name, values in speeds.items():
        lines.append(f"| {name}, steps/s | {statistics.median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")
    for name, values in ratios.items():
        lines.append(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
