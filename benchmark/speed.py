"""Steps per second of a pair of twins and of stable-baselines3's PPO, at the twins' default settings, measured in turn.

    python benchmark/speed.py                      # BeamRider
    python benchmark/speed.py --family continuous  # HalfCheetah

Each round trains each of the three for `steps` agent steps, in a process of its own, so that a machine whose speed
drifts slows all of them; ratios are taken within a round and their median reported. Start-up is not counted.
stable-baselines3 plays through its own wrappers: Atari's, 8 environments in one process (its default), or VecNormalize.
"""

import dataclasses
import importlib
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

REFERENCE = "stable-baselines3"
TWINS = {
    "atari": ("ppo_atari_baseline.py", "sprig_atari.py"),
    "continuous": ("ppo_continuous_baseline.py", "sprig_continuous.py"),
}


@dataclass
class Args:
    family: Literal["atari", "continuous"] = "atari"
    """which twins: on BeamRider, or on HalfCheetah"""
    rounds: int = 5
    """rounds; each trains every contestant once"""
    steps: int = 0
    """agent steps per contestant and round (0: 4096 on Atari, 16384 on vectors)"""
    threads: int = 0
    """CPU threads of the networks and of the emulator (0: 2 on Atari, 1 on vectors)"""
    output: Path | None = None
    """the table, in Markdown (default: benchmark/results/speed.md or speed_continuous.md)"""
    contestant: str = "all"
    """run this one once in this process and print its steps per second"""


def stable_baselines3(args: Args) -> float:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    torch.set_num_threads(args.threads)
    settings = importlib.import_module(Path(TWINS[args.family][0]).stem).Args()
    if args.family == "atari":
        envs = VecFrameStack(make_atari_env(settings.env_id, n_envs=settings.num_envs, seed=0), 4)
    else:
        envs = VecNormalize(make_vec_env(settings.env_id, n_envs=settings.num_envs, seed=0), gamma=settings.gamma)
    model = PPO(
        "CnnPolicy" if args.family == "atari" else "MlpPolicy",
        envs,
        n_steps=settings.num_steps,
        batch_size=settings.minibatch_size,
        n_epochs=settings.update_epochs,
        learning_rate=settings.learning_rate,
        clip_range_vf=settings.clip_coef if settings.clip_value_loss else None,
        ent_coef=settings.ent_coef,
        vf_coef=settings.vf_coef,
        device="cpu",
    )
    start = time.perf_counter()
    model.learn(args.steps)
    return args.steps / (time.perf_counter() - start)


def ours(name: str, args: Args) -> float:
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
    command = [sys.executable, __file__, "--family", args.family, "--contestant", name]
    command += ["--steps", str(args.steps), "--threads", str(args.threads)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return float(output.split()[-1])


def main(args: Args) -> None:
    atari = args.family == "atari"
    args = dataclasses.replace(args, steps=args.steps or (4096 if atari else 16384), threads=args.threads or 1 + atari)
    if args.contestant != "all":
        print(stable_baselines3(args) if args.contestant == REFERENCE else ours(args.contestant, args))
        return
    contestants = (REFERENCE, *TWINS[args.family])
    speeds = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name in contestants:
            speeds[name].append(measure(name, args))
            print(f"{name}: {speeds[name][-1]:.0f} steps/s", file=sys.stderr)
    reference, ppo, sprig = speeds.values()
    ratios = {
        "PPO's steps per second over stable-baselines3's": [a / b for a, b in zip(ppo, reference)],
        "SPRIG's time per step over PPO's": [a / b for a, b in zip(ppo, sprig)],
    }
    simulator = "ale-py" if atari else "mujoco"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", simulator, "gymnasium", "stable-baselines3"))
    lines = [
        f"`python benchmark/speed.py --family {args.family} --rounds {args.rounds} --steps {args.steps} "
        f"--threads {args.threads}` on {cpu_model()} ({platform.machine()}), "
        f"Python {platform.python_version()}, {packages}.",
        "",
        f"| | median of {args.rounds} | lowest | highest |",
        "|-|-|-|-|",
    ]
    for name, values in speeds.items():
        lines.append(f"| {name}, steps/s | {statistics.median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")
    for name, values in ratios.items():
        lines.append(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    output = args.output or Path("benchmark/results") / ("speed.md" if atari else "speed_continuous.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
