"""Steps per second of PPO and SPRIG, beside others' PPO or another checkout.

    python benchmark/speed.py                      # BeamRider, defaults
    python benchmark/speed.py --family continuous  # HalfCheetah
    python benchmark/speed.py --settings cleanrl   # with CleanRL's settings
    python benchmark/speed.py --against CHECKOUT   # here and in another
    python benchmark/speed.py --cleanrl CLONE --cleanrl-python PYTHON

Every contestant is a program started from outside, as a user would start it, without evaluation: once for one rollout,
once for `rollouts` more. The difference is what the further steps took, start-up left out, whatever a script logs. In a
round all take their turn, in every other one backwards, as the speed of machines drifts; ratios are taken within a
round. On a busy machine trust those per second of CPU, which the work of others does not enter. stable-baselines3 plays
through its own wrappers: Atari's, environments in one process (its default), or VecNormalize. CleanRL's ppo_atari.py or
ppo_continuous_action.py runs as it is in a clone of https://github.com/vwxyzjn/cleanrl, with as many environments,
steps, minibatches and epochs (on HalfCheetah-v4, as it asks for a Gymnasium that has no v5).

Writes <results>/<name>.csv, all that was measured, and .md, medians with least and greatest, anew after each round.
"""

import csv
import dataclasses
import importlib
import itertools
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import tyro
from run import cpu_model, fail, flag_words, parse_words

SCRIPTS = {
    "atari": ("ppo_atari_baseline.py", "sprig_atari.py"),
    "continuous": ("ppo_continuous_baseline.py", "sprig_continuous.py"),
}
CLEANRL_SCRIPTS = {"atari": "cleanrl/ppo_atari.py", "continuous": "cleanrl/ppo_continuous_action.py"}
CLEANRL_TASKS = {"atari": "ale_py:BeamRiderNoFrameskip-v4", "continuous": "HalfCheetah-v4"}  # ale_py: import it
SIMULATOR = {"atari": "ale-py", "continuous": "mujoco"}
SETTINGS = {
    "default": {},
    "cleanrl": {  # https://github.com/vwxyzjn/cleanrl, ppo_atari.py
        "num_steps": 128,
        "minibatch_size": 256,
        "learning_rate": 2.5e-4,
        "anneal_lr": True,
        "norm_adv": "minibatch",
        "clip_coef": 0.1,
        "clip_value_loss": True,
        "vf_coef": 0.25,
    },
}
STEPS, CPU, MEMORY = "steps per second", "steps per second of CPU", "peak memory, MiB"


@dataclass
class Args:
    family: Literal["atari", "continuous"] = "atari"
    """which pair of scripts: on BeamRider, or on HalfCheetah"""
    settings: Literal["default", "cleanrl"] = "default"
    """the scripts' own, or CleanRL's for Atari"""
    flags: str = ""
    """further flags of the two scripts: --flags="--compile" """
    against: Path | None = None
    """another checkout of this repository, whose scripts take part instead of stable-baselines3"""
    rounds: int = 5
    """rounds; in each every contestant is measured once"""
    rollouts: int = 0
    """rollouts that are timed (0: 8 on Atari, 20 on vectors)"""
    threads: int = 0
    """CPU threads (0: 2 on Atari, 1 on vectors)"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks are"""
    cleanrl: Path | None = None
    """a clone of CleanRL, whose PPO then takes part"""
    cleanrl_python: str = sys.executable
    """the Python that runs it: CleanRL asks for older packages than ours"""
    results: Path = Path("results")
    """folder of the table and its data"""
    name: str = ""
    """of their files (default: speed_<family>_<settings>[_against])"""
    reference: int = 0
    """train stable-baselines3 for so many agent steps in this process, and measure nothing"""


def settings_of(args: Args):
    """The arguments of the PPO script. Ends with one line if it, or SPRIG's, refuses them."""
    try:
        words = flag_words(SETTINGS[args.settings]) + shlex.split(args.flags)
    except ValueError as error:
        fail(f"--flags {args.flags}: {error}")
    scripts = [importlib.import_module(Path(name).stem) for name in SCRIPTS[args.family]]
    return [parse_words(words, script, "--flags") for script in scripts][0]


def train_reference(args: Args) -> None:
    """stable-baselines3's PPO at the baseline's settings, for `args.reference` agent steps."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    torch.set_num_threads(args.threads)
    settings = settings_of(args)
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
        clip_range=settings.clip_coef,
        clip_range_vf=settings.clip_coef if settings.clip_value_loss else None,
        ent_coef=settings.ent_coef,
        vf_coef=settings.vf_coef,
        device=args.device,
    )
    model.learn(args.reference)


def contestants(args: Args, settings) -> dict[str, list[str]]:
    """Name -> command, to which the number of agent steps is added as its last word."""
    flags = flag_words({"eval_episodes": 0, "checkpoint_interval": 0, "threads": args.threads, "device": args.device})
    flags += flag_words(SETTINGS[args.settings]) + shlex.split(args.flags) + ["--run-dir", "run", "--total-timesteps"]
    own = {"family": args.family, "settings": args.settings, "threads": args.threads, "device": args.device}
    reference = [
        sys.executable,
        str(Path(__file__).absolute()),
        *flag_words(own),
        f"--flags={args.flags}",
        "--reference",
    ]
    commands = {} if args.against else {"stable-baselines3": reference}
    if args.cleanrl:
        sizes = {name: getattr(settings, name) for name in ("num_envs", "num_steps", "update_epochs")}
        sizes["num_minibatches"] = settings.num_envs * settings.num_steps // settings.minibatch_size
        words = flag_words({"env_id": CLEANRL_TASKS[args.family]} | sizes)
        script = str(args.cleanrl.absolute() / CLEANRL_SCRIPTS[args.family])
        commands["CleanRL"] = [args.cleanrl_python, script, *words, "--total-timesteps"]
    for script in SCRIPTS[args.family]:
        commands[script] = [sys.executable, str(ROOT / script), *flags]
        if args.against:
            commands[f"{script}, {args.against}"] = [sys.executable, str(args.against.absolute() / script), *flags]
    return commands


def spent(command: list[str], name: str, args: Args) -> tuple[float, float, float]:
    """By one process: seconds, seconds of CPU (of all its threads), and its largest memory in MiB (on Linux)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            said.seek(0)
            *_, last_line = ["no message", *said.read().decode(errors="replace").strip().splitlines()]
            fail(f"{name} failed: {last_line}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(command: list[str], name: str, rollout: int, args: Args) -> dict[str, float]:
    steps = args.rollouts * rollout
    short, short_cpu, _ = spent([*command, str(rollout)], name, args)
    long, long_cpu, memory = spent([*command, str(rollout + steps)], name, args)
    if long <= short:
        fail(f"{name} took no longer for {rollout + steps} steps than for {rollout}: raise --rollouts")
    return {STEPS: steps / (long - short), CPU: steps / (long_cpu - short_cpu), MEMORY: memory}


def table(rounds: list[dict[str, dict[str, float]]], heading: str, args: Args) -> str:
    """In Markdown: medians over rounds with their range."""
    names, (ppo, sprig) = list(rounds[0]), SCRIPTS[args.family]
    pairs = [(ppo, name) for name in names if name not in (ppo, sprig)] + [(ppo, sprig)]
    if args.against:
        pairs = [(script, f"{script}, {args.against}") for script in (ppo, sprig)]
    lines = [heading, "", f"| | median of {len(rounds)} | lowest | highest |", "|-|-|-|-|"]

    def row(title: str, values: list[float], form: str) -> None:
        cells = (f"{f(values):{form}}" for f in (statistics.median, min, max))
        lines.append(f"| {title} | {' | '.join(cells)} |")

    for quantity, name in itertools.product((STEPS, CPU, MEMORY), names):
        row(f"{name}, {quantity}", [each[name][quantity] for each in rounds], ",.0f")
    for (above, below), quantity in itertools.product(pairs, (STEPS, CPU)):
        values = [each[above][quantity] / each[below][quantity] for each in rounds]
        row(f"{above} over {below}, {quantity}", values, ".2f")
    return "\n".join(lines) + "\n"


def check(args: Args) -> Args:
    """With the defaults filled in. Ends with one line before anything is measured or written."""
    for name, least in (("rounds", 1), ("rollouts", 0), ("threads", 0)):
        if getattr(args, name) < least:
            fail(f"--{name} {getattr(args, name)} is less than {least}")
    if args.settings == "cleanrl" and args.family != "atari":
        fail("--settings cleanrl is for Atari; the vector scripts' own settings are CleanRL's")
    if not args.against and not find_spec("stable_baselines3"):
        fail("stable-baselines3 is not installed: pip install -r requirements-dev.txt")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            fail("--device cuda: PyTorch finds no GPU here")
    needed = [(args.cleanrl, CLEANRL_SCRIPTS[args.family]), *((args.against, name) for name in SCRIPTS[args.family])]
    for folder, name in needed:
        if folder and not (folder / name).is_file():
            fail(f"{folder} has no {name}")
    if not (python := shutil.which(args.cleanrl_python)):
        fail(f"--cleanrl-python {args.cleanrl_python} is not a program")
    rollouts, threads = (8, 2) if args.family == "atari" else (20, 1)
    name = args.name or f"speed_{args.family}_{args.settings}{'_against' if args.against else ''}"
    counts = {"rollouts": args.rollouts or rollouts, "threads": args.threads or threads}
    return dataclasses.replace(args, **counts, name=name, cleanrl_python=os.path.abspath(python))


def main(args: Args) -> None:
    args = check(args)
    if args.reference:
        return train_reference(args)
    settings = settings_of(args)
    commands = contestants(args, settings)
    output = args.results / f"{args.name}.csv"
    if output.exists() or output.with_suffix(".md").exists():
        fail(f"{output} or its .md is there already; choose another --name or --results")
    try:
        args.results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.results).close()
    except OSError as error:
        fail(f"--results {args.results} cannot be written: {error.strerror}")
    packages = ["torch", SIMULATOR[args.family], "gymnasium", *(["stable-baselines3"] if not args.against else [])]
    heading = f"`python benchmark/speed.py {shlex.join(sys.argv[1:])}`, {args.rollouts} rollouts of "
    heading += (
        f"{settings.num_envs * settings.num_steps} steps, {args.threads} thread(s), {args.device}, on {cpu_model()}"
    )
    heading += f", Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}."
    rounds = []
    for number in range(args.rounds):
        measured = dict.fromkeys(commands)  # in this order
        for name in reversed(commands) if number % 2 else commands:
            measured[name] = measure(commands[name], name, settings.num_envs * settings.num_steps, args)
            print(f"round {number + 1}, {name}: {measured[name][STEPS]:.0f} steps/s", file=sys.stderr, flush=True)
        rounds.append(measured)
        with open(output, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["contestant", "round", "quantity", "value"])
            for (k, each), name, quantity in itertools.product(enumerate(rounds, 1), commands, (STEPS, CPU, MEMORY)):
                writer.writerow([name, k, quantity, f"{each[name][quantity]:.6g}"])
        output.with_suffix(".md").write_text(table(rounds, heading, args))
    print(output.with_suffix(".md").read_text(), end="")


if __name__ == "__main__":
    main(tyro.cli(Args, description="\n\n".join(__doc__.split("\n\n")[:2])))
