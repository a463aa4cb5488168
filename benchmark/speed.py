"""Steps per second of both scripts and of stable-baselines3's PPO, at Table 1's settings, measured in turn.

    python benchmark/speed.py

Each round trains each of the three for `steps` agent steps on BeamRider, so that a machine whose speed drifts
slows all of them; ratios are taken within a round and their median reported. stable-baselines3 plays through
its own Atari wrappers (8 environments in one process, its default).
"""

import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_atari_baseline
import sprig_atari


@dataclass
class Args:
    rounds: int = 5
    """rounds; each trains every contestant once"""
    steps: int = 4096
    """agent steps per contestant and round"""
    threads: int = 0
    """CPU threads of the networks and of the emulator (0: all cores)"""
    output: Path = Path("benchmark/results/speed.md")
    """the table, in Markdown"""


def stable_baselines3(args: Args):
    """A function that trains for `args.steps` and returns steps per second."""
    envs = VecFrameStack(make_atari_env("BeamRiderNoFrameskip-v4", n_envs=8, seed=0), 4)
    table1 = ppo_atari_baseline.Args()
    model = PPO(
        "CnnPolicy",
        envs,
        n_steps=table1.num_steps,
        batch_size=table1.minibatch_size,
        n_epochs=table1.update_epochs,
        learning_rate=table1.learning_rate,
        ent_coef=table1.ent_coef,
        vf_coef=table1.vf_coef,
        device="cpu",
    )

    def run() -> float:
        start = time.perf_counter()
        model.learn(args.steps, reset_num_timesteps=False)
        return args.steps / (time.perf_counter() - start)

    return run


def ours(script, args: Args):
    """The same for one of our scripts, through its `main`."""

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            run_dir = f"{folder}/run"
            script.main(
                script.Args(
                    run_dir=run_dir, device="cpu", threads=args.threads, total_timesteps=args.steps, eval_episodes=0
                )
            )
            events = EventAccumulator(run_dir)
            events.Reload()
            return events.Scalars("charts/SPS")[-1].value

    return run


def main(args: Args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    contestants = {
        "stable-baselines3 PPO": stable_baselines3(args),
        "ppo_atari_baseline.py": ours(ppo_atari_baseline, args),
        "sprig_atari.py": ours(sprig_atari, args),
    }
    speeds = {name: [] for name in contestants}
    for round_number in range(args.rounds + 1):
        for name, run in contestants.items():
            speed = run()
            if round_number:  # the first round warms up
                speeds[name].append(speed)
    reference, ppo, sprig = speeds.values()
    ratios = {
        "PPO over stable-baselines3 (steps per second)": [a / b for a, b in zip(ppo, reference)],
        "SPRIG over PPO (time per step)": [a / b for a, b in zip(ppo, sprig)],
    }
    lines = [
        f"`python benchmark/speed.py --rounds {args.rounds} --steps {args.steps} --threads {args.threads}`: "
        f"{torch.get_num_threads()} threads, {platform.machine()} {cpu_model()}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "ale-py", "gymnasium", "stable-baselines3")),
        "",
        "| | median | lowest | highest |",
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
