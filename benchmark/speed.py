"""Steps per second of a pair of twins and of others' PPO, what they go into, and how many there could be.

    python benchmark/speed.py                        # BeamRider at Table 1's settings
    python benchmark/speed.py --settings cleanrl     # BeamRider at those that CleanRL publishes
    python benchmark/speed.py --family continuous    # HalfCheetah
    python benchmark/speed.py --family continuous --compile --steps 102400   # under torch.compile
    python benchmark/speed.py --device cuda
    python benchmark/speed.py --cleanrl-clone CLONE --cleanrl-python PYTHON   # CleanRL's PPO takes part

Each round trains every contestant for `steps` agent steps, in a process of its own, so that a machine whose speed
drifts slows all of them; ratios are taken within a round and their median reported. Start-up is not counted, nor is the
first rollout with its update, in which kernels are chosen, with --compile made, and, on a GPU, loaded.
stable-baselines3 plays through its own wrappers: Atari's, environments in one process (its default), or VecNormalize.
CleanRL's ppo_atari.py or ppo_continuous_action.py runs as it is in a clone of https://github.com/vwxyzjn/cleanrl, on as
many environments, steps, minibatches and epochs (and on HalfCheetah-v4, as it asks for a Gymnasium that has no v5). It
logs whole steps per second, rounded down.

After the rounds each twin trains once more under a clock, which tells the phases apart (on a GPU it waits for the
device at each change of phase). Then its last gradient step is repeated alone. Two limits follow, in steps per
second: `bare update` if all but the gradient steps were free; `arithmetic` if nothing took time but the floating-point
operations, at the rate of a large matrix product. And a profile of that gradient step: each operation's share of it,
without those that it calls (on a GPU: of the time in which the CPU is busy handing them out). With --compile there is
no clock: the phases are one graph. Writes a table in Markdown and all that was measured as CSV.
"""

import csv
import dataclasses
import importlib
import json
import os
import platform
import resource
import shutil
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

REFERENCE, CLEANRL = "stable-baselines3", "CleanRL"
TWINS = {
    "atari": ("ppo_atari_baseline.py", "sprig_atari.py"),
    "continuous": ("ppo_continuous_baseline.py", "sprig_continuous.py"),
}
SETTINGS = {
    "default": {},  # Table 1 on Atari, the usual ones for MuJoCo on vectors
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
CLEANRL_SCRIPTS = {"atari": "cleanrl/ppo_atari.py", "continuous": "cleanrl/ppo_continuous_action.py"}
CLEANRL_TASKS = {"atari": "ale_py:BeamRiderNoFrameskip-v4", "continuous": "HalfCheetah-v4"}  # ale_py: import it
OPERATIONS = 10  # shown of a profile
COLUMNS = ("contestant", "round", "quantity", "value")
PHASES = ("emulator", "inference", "leader", "follower", "joint step", "logging", "other")


@dataclass
class Args:
    family: Literal["atari", "continuous"] = "atari"
    """which twins: on BeamRider, or on HalfCheetah"""
    settings: Literal["default", "cleanrl"] = "default"
    """the scripts' own (Table 1 on Atari), or CleanRL's for Atari"""
    rounds: int = 5
    """rounds; each trains every contestant once"""
    steps: int = 0
    """agent steps per contestant and round, in whole rollouts (0: 4096 on Atari, 16384 on vectors)"""
    threads: int = 0
    """CPU threads of the networks and of the emulator (0: 2 on Atari, 1 on vectors)"""
    device: str = "cpu"
    """where the networks are: cpu or cuda"""
    compile: bool = False
    """the twins under their --compile; the others as they are"""
    cleanrl_clone: Path | None = None
    """a clone of CleanRL, whose PPO then takes part"""
    cleanrl_python: str = sys.executable
    """the Python that runs it: CleanRL asks for older packages than ours"""
    output: Path | None = None
    """the table; its data as .csv beside it (default: benchmark/results/speed, _continuous, _cleanrl, ... .md)"""
    contestant: str = "all"
    """run this one once in this process and print what was measured"""
    clock: bool = False
    """with --contestant: tell the phases apart, which costs some speed"""


class Clock:
    """Adds up the seconds of each phase, from start() on; where phases are nested, the innermost counts."""

    def __init__(self, device: str):
        self.phases, self.on_gpu = ["other"], device != "cpu"
        self.start()

    def start(self) -> None:
        self.seconds, self.since = dict.fromkeys(PHASES, 0.0), time.perf_counter()

    def turn_to(self, phases: list[str]) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.phases[-1]] += now - self.since
        self.since, self.phases = now, phases

    def watch(self, owner, name: str, phase: str) -> None:
        """Count calls of owner.name as `phase`."""
        function = getattr(owner, name)

        def timed(*inputs, **options):
            outside = self.phases
            self.turn_to([*outside, phase])
            try:
                return function(*inputs, **options)
            finally:
                self.turn_to(outside)

        setattr(owner, name, timed)


def watch_phases(script, clock: Clock) -> list:
    """Let the clock follow a script's main. Returns a list: gradient steps taken, their function, its last inputs."""
    make_envs, collect_rollout, descend = script.make_envs, script.collect_rollout, script.descend
    steps = [0]

    def watched_envs(*inputs, **options):
        envs = make_envs(*inputs, **options)
        clock.watch(envs, "step", "emulator")
        return envs

    def first_rollout(*inputs):
        script.collect_rollout = second_rollout
        return collect_rollout(*inputs)

    def second_rollout(*inputs):
        clock.start()
        steps[0] = 0
        script.collect_rollout = collect_rollout
        clock.watch(script, "collect_rollout", "inference")
        return script.collect_rollout(*inputs)

    def descend_and_turn(*inputs, **players):
        norm = descend(*inputs, **players)
        if list(players) == ["leader"]:  # its stage is over
            clock.turn_to([*clock.phases[:-1], "follower"])
        return norm

    script.make_envs, script.collect_rollout, script.descend = watched_envs, first_rollout, descend_and_turn
    for name in ("log_iteration", "save_checkpoint"):
        clock.watch(script, name, "logging")
    name, phase = (
        ("stackelberg_step", "leader") if hasattr(script, "stackelberg_step") else ("joint_step", "joint step")
    )
    step = getattr(script, name)
    clock.watch(script, name, phase)
    timed = getattr(script, name)

    def remembered(*inputs):
        steps[:] = [steps[0] + 1, step, *inputs]
        return timed(*inputs)

    setattr(script, name, remembered)
    return steps


def limits(steps: list, args: Args) -> dict:
    """Steps per second if nothing but the gradient steps took time, and if they ran at the machine's rate."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def seconds(function, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            if args.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    played, step, *inputs = steps
    leader, follower, *_, minibatch, settings = inputs
    rollout_size = settings.num_envs * settings.num_steps
    per_step = played / (args.steps // rollout_size * rollout_size)  # a KL limit ends a rollout's epochs early
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        follower(leader(minibatch.obs[:1]))
    acting = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        step(*inputs)
    flops = acting + per_step * counter.get_total_flops()
    matrix = torch.randn(4096, 4096, device=args.device)
    rate = 2 * len(matrix) ** 3 / seconds(lambda: matrix @ matrix, 7)
    return {
        "megaflop per step": flops / 1e6,
        "gigaflop per second of a matrix product": rate / 1e9,
        "steps/s if only gradient steps took time": 1 / (per_step * seconds(lambda: step(*inputs), 30)),
        "steps/s if only arithmetic took time": rate / flops,
    }


def operations(steps: list) -> dict:
    """Shares of the operations that take most of a gradient step, and of all others."""
    import torch

    _, step, *inputs = steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(10):
            step(*inputs)
    seconds = sorted(((event.self_cpu_time_total, event.key) for event in profile.key_averages()), reverse=True)
    total = sum(share for share, _ in seconds)
    shares = {f"share of a gradient step: {key}": share / total for share, key in seconds[:OPERATIONS]}
    return shares | {"share of a gradient step: all others": sum(s for s, _ in seconds[OPERATIONS:]) / total}


def stable_baselines3(args: Args) -> dict:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    torch.set_num_threads(args.threads)
    settings, rollout = settings_of(args)
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
    model.learn(rollout)
    start = time.perf_counter()
    model.learn(args.steps, reset_num_timesteps=False)
    return {"steps per second": args.steps / (time.perf_counter() - start)}


def settings_of(args: Args):
    """The baseline's arguments, and the size of its rollout."""
    script = importlib.import_module(Path(TWINS[args.family][0]).stem)
    settings = script.Args(**SETTINGS[args.settings])
    return settings, settings.num_envs * settings.num_steps


def cleanrl(args: Args) -> dict:
    settings, rollout = settings_of(args)
    flags = {
        "--env-id": CLEANRL_TASKS[args.family],
        "--num-envs": settings.num_envs,
        "--num-steps": settings.num_steps,
        "--num-minibatches": rollout // settings.minibatch_size,
        "--update-epochs": settings.update_epochs,
        "--total-timesteps": rollout + args.steps,
    }
    command = [args.cleanrl_python, str(args.cleanrl_clone / CLEANRL_SCRIPTS[args.family])]
    command += [str(word) for flag in flags.items() for word in flag]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        output_of(command, CLEANRL, cwd=folder, env=environment)
        return {"steps per second": steady_speed(str(next(Path(folder, "runs").iterdir())))}


def ours(name: str, args: Args) -> dict:
    """One training run. With `clock`, each phase's share of the time, and the limits."""
    script = importlib.import_module(Path(name).stem)
    settings = {"device": args.device, "threads": args.threads, "eval_episodes": 0, "compile": args.compile}
    settings |= SETTINGS[args.settings]
    _, rollout = settings_of(args)
    settings |= {"total_timesteps": rollout + args.steps}
    clock = Clock(args.device)
    steps = watch_phases(script, clock) if args.clock else []
    with tempfile.TemporaryDirectory() as folder:
        script.main(script.Args(run_dir=f"{folder}/run", **settings))
        clock.turn_to(["other"])
        if args.clock:
            total = sum(clock.seconds.values())
            shares = {f"share: {phase}": seconds / total for phase, seconds in clock.seconds.items()}
            return shares | limits(steps, args) | operations(steps)
        return {"steps per second": steady_speed(f"{folder}/run")}


def steady_speed(run_dir: str) -> float:
    """Steps per second of a run after its first rollout."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run_dir, size_guidance={"scalars": 0})
    events.Reload()
    first, *_, last = events.Scalars("charts/SPS")  # steps per second since the first rollout began
    return (last.step - first.step) / (last.step / last.value - first.step / first.value)


def contestants(args: Args) -> tuple[str, ...]:
    return (REFERENCE, *((CLEANRL,) if args.cleanrl_clone else ()), *TWINS[args.family])


def contest(args: Args) -> dict:
    """What one contestant's run measured, with the process's largest memory."""
    others = {REFERENCE: stable_baselines3, CLEANRL: cleanrl}
    measured = others[args.contestant](args) if args.contestant in others else ours(args.contestant, args)
    # Of a child, Linux counts no less than this process held as it started it (with PyTorch loaded, some 300 MiB).
    who = resource.RUSAGE_CHILDREN if args.contestant == CLEANRL else resource.RUSAGE_SELF
    measured["peak memory, MiB"] = resource.getrusage(who).ru_maxrss / 1024
    if args.device != "cpu" and args.contestant != CLEANRL:
        import torch

        measured["peak GPU memory, MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return measured


def measure(name: str, args: Args, clock: bool = False) -> dict:
    """contest() in a fresh process."""
    command = [sys.executable, __file__, "--family", args.family, "--settings", args.settings, "--device", args.device]
    command += ["--contestant", name, "--steps", str(args.steps), "--threads", str(args.threads)]
    if name == CLEANRL:
        command += ["--cleanrl-clone", str(args.cleanrl_clone), "--cleanrl-python", args.cleanrl_python]
    command += ["--compile"] if args.compile else []
    command += ["--clock"] if clock else []
    return json.loads(output_of(command, name).splitlines()[-1])


def output_of(command: list[str], name: str, **options) -> str:
    """What a process prints. Ends with one line, the last of its errors, if it fails."""
    process = subprocess.run(command, capture_output=True, text=True, **options)
    if process.returncode:
        raise SystemExit(f"error: {name} failed: {(process.stderr.strip() or 'no message').splitlines()[-1]}")
    return process.stdout


def check(args: Args) -> Args:
    """Ends with a one-line error before anything is measured or written. Returns them with absolute paths."""
    for name, least in (("rounds", 1), ("steps", 0), ("threads", 0)):
        if getattr(args, name) < least:
            raise SystemExit(f"error: --{name} {getattr(args, name)} is less than {least}")
    if args.device not in ("cpu", "cuda"):
        raise SystemExit(f"error: --device {args.device} is neither cpu nor cuda")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("error: --device cuda: PyTorch finds no GPU here")
    if args.settings == "cleanrl" and args.family != "atari":
        raise SystemExit("error: --settings cleanrl is for Atari; the vector scripts' own settings are CleanRL's")
    if args.clock and args.contestant not in TWINS[args.family]:
        raise SystemExit(f"error: --clock is for one script: add --contestant with {' or '.join(TWINS[args.family])}")
    if args.clock and args.compile:
        raise SystemExit("error: --clock cannot look into what --compile makes one graph; leave one out")
    if args.contestant == CLEANRL and not args.cleanrl_clone:
        raise SystemExit(f"error: --contestant {CLEANRL} needs --cleanrl-clone")
    if args.contestant not in ("all", *contestants(args)):
        raise SystemExit(f"error: --contestant {args.contestant} is none of {', '.join(contestants(args))}")
    _, rollout = settings_of(args)
    if args.steps % rollout:
        raise SystemExit(f"error: --steps {args.steps} is not a multiple of the rollout of {rollout} steps")
    if not args.cleanrl_clone and args.cleanrl_python != Args.cleanrl_python:
        raise SystemExit("error: --cleanrl-python would do nothing without --cleanrl-clone")
    if args.cleanrl_clone:
        clone, python = find_cleanrl(args.cleanrl_clone, args.cleanrl_python, args.family)
        name = CLEANRL_SCRIPTS[args.family]
        output_of([python, str(clone / name), "--help"], f"--cleanrl-python: {name}")
        args = dataclasses.replace(args, cleanrl_clone=clone, cleanrl_python=python)
    return args


def find_cleanrl(clone: Path, python: str, family: str) -> tuple[Path, str]:
    """Where both are, from any folder. Ends with one line if one of them is not there."""
    if not (clone / CLEANRL_SCRIPTS[family]).is_file():
        name = CLEANRL_SCRIPTS[family]
        raise SystemExit(f"error: --cleanrl-clone {clone} is no clone of CleanRL: it has no {name}")
    if not (program := shutil.which(python)):
        raise SystemExit(f"error: --cleanrl-python {python} is not a program")
    return clone.absolute(), os.path.abspath(program)


def check_output(path: Path, suffix: str, beside: str) -> None:
    """Make its folder. Ends with a one-line error if the name has another suffix, or nothing can be written there."""
    if path.suffix != suffix or path.is_dir():
        raise SystemExit(f"error: --output {path} is not the name of a {suffix} file; {beside}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise SystemExit(f"error: --output {path} cannot be written: {error.strerror}") from None


def main(args: Args) -> None:
    args = check(args)
    atari = args.family == "atari"
    args = dataclasses.replace(args, steps=args.steps or (4096 if atari else 16384), threads=args.threads or 1 + atari)
    if args.contestant != "all":
        print(json.dumps(contest(args)))
        return
    suffix = "" if atari else "_continuous"
    suffix += ("" if args.settings == "default" else f"_{args.settings}") + ("_compile" if args.compile else "")
    suffix += "" if args.device == "cpu" else "_cuda"
    output = args.output or Path(f"benchmark/results/speed{suffix}.md")
    check_output(output, ".md", "the data go into .csv beside it")
    simulator = "ale-py" if atari else "mujoco"
    packages = ("torch", simulator, "gymnasium", "stable-baselines3")
    command = f"python benchmark/speed.py --family {args.family} --settings {args.settings} --rounds {args.rounds}"
    command += f" --steps {args.steps} --threads {args.threads} --device {args.device}"
    command += " --compile" if args.compile else ""
    command += " --cleanrl-clone CLONE --cleanrl-python PYTHON" if args.cleanrl_clone else ""
    heading = f"`{command}` on {machine(args.device)}, Python {platform.python_version()}, "
    heading += f"{', '.join(f'{name} {version(name)}' for name in packages)}."
    if args.cleanrl_clone:
        names = ("torch", simulator, "gymnasium")
        ask = f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}}' for n in {names}), sep=', ')"
        heading += f" CleanRL with {output_of([args.cleanrl_python, '-c', ask], CLEANRL).strip()}."
    rounds = [{} for _ in range(args.rounds)]
    for measured in rounds:
        for name in contestants(args):
            measured[name] = measure(name, args)
            print(f"{name}: {measured[name]['steps per second']:.0f} steps/s", file=sys.stderr)
    clocked = {} if args.compile else {name: measure(name, args, clock=True) for name in TWINS[args.family]}

    with open(output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, measured in [*enumerate(rounds, start=1), ("clocked", clocked)]:
            for name, quantities in measured.items():
                writer.writerows([name, number, quantity, f"{value:.6g}"] for quantity, value in quantities.items())
    text = report(read(output.with_suffix(".csv")), heading)
    output.write_text(text)
    print(text, end="")


def read(path: Path, columns: tuple[str, ...] = COLUMNS) -> list[dict]:
    """The rows of an earlier measurement. Ends with a one-line error if the file does not hold any."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or set(rows[0]) != set(columns):
        raise SystemExit(f"error: {path} has not the columns {', '.join(columns)}; measure again")
    return rows


def report(rows: list[dict], heading: str) -> str:
    """The table: medians over rounds with their range, then what the clock told."""
    measured = {}  # round -> contestant -> quantity -> value
    for row in rows:
        measured.setdefault(row["round"], {}).setdefault(row["contestant"], {})[row["quantity"]] = float(row["value"])
    clocked = measured.pop("clocked", {})  # none with --compile
    rounds = list(measured.values())
    *others, ppo, sprig = names = list(rounds[0])
    lines = [heading, "", f"| | median of {len(rounds)} | lowest | highest |", "|-|-|-|-|"]

    def row(title: str, values: list[float], form: str) -> str:
        return f"| {title} | " + " | ".join(f"{f(values):{form}}" for f in (statistics.median, min, max)) + " |"

    def speeds(name: str) -> list[float]:
        return [measured[name]["steps per second"] for measured in rounds]

    lines += [row(f"{name}, steps/s", speeds(name), ".0f") for name in names]
    ratios = {f"PPO's steps per second over {other}'s": zip(speeds(ppo), speeds(other)) for other in others}
    ratios |= {"SPRIG's time per step over PPO's": zip(speeds(ppo), speeds(sprig))}
    lines += [row(title, [a / b for a, b in pairs], ".2f") for title, pairs in ratios.items()]
    lines += [row(f"{name}, peak memory, MiB", [m[name]["peak memory, MiB"] for m in rounds], ".0f") for name in names]
    if clocked:
        lines += ["", "| | " + " | ".join(clocked) + " |", "|-|" + "-|" * len(clocked)]
    quantities = dict.fromkeys(quantity for measured in clocked.values() for quantity in measured)
    for quantity in sorted(quantities, key=lambda quantity: quantity.endswith("all others")):
        if quantity.startswith("peak"):
            continue
        form = ".0%" if quantity.startswith("share") else ",.0f"
        cells = (f"{measured[quantity]:{form}}" if quantity in measured else "" for measured in clocked.values())
        lines.append(f"| {quantity} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def machine(device: str) -> str:
    if device != "cpu":
        import torch

        return f"{torch.cuda.get_device_name()} and {cpu_model()}"
    return f"{cpu_model()} ({platform.machine()})"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
