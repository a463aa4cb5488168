"""How time and memory grow: with environments, minibatch, resolution or entries of the observation, and processes.

    python benchmark/scale.py   # measures for some ten minutes a round on two cores
    python benchmark/plot.py    # draws what was measured

Each point is a process of its own, all points of a round in turn, so that a machine whose speed drifts slows all of
them; of the rounds the median counts. What is measured:

- environments: `collect_rollout` over 32 steps of so many games (HalfCheetah, BeamRider), emulator included
- minibatch, and entries or resolution (at a minibatch of 32): one gradient step (SPRIG: leader and follower) on random
  observations
- processes: training under `torchrun`, one thread each, 8 games: the time of 1000 agent steps

The growth is the exponent p of time ~ size^p, by least squares through the logarithms of all points, and once more
between the last two, where what does not grow weighs least; beside it the same for the floating-point operations, which
no step's time should outgrow. Memory is the process's peak beyond what it held once the script was imported, some
90 MiB of it PyTorch's own (Linux only); under torchrun that of the largest process, whole; on a GPU the GPU's.
"""

import csv
import dataclasses
import importlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro
from collect import fail, render
from gradient_cost import resident
from speed import TWINS, check_output, cpu_model, output_of, read, steady_speed

SCRIPTS = {family: dict(zip(("PPO", "SPRIG"), (Path(name).stem for name in twins))) for family, twins in TWINS.items()}
SWEEPS = {
    "atari": {
        "environments": (1, 4, 16, 64, 256),
        "minibatch": (16, 32, 64, 128, 256),
        "resolution": (84, 105, 126, 147, 168),
        "processes": (1, 2),
    },
    "continuous": {
        "environments": (1, 4, 16, 64, 256),
        "minibatch": (16, 64, 256, 1024),
        "entries": (4, 17, 64, 128, 348),
        "processes": (1, 2),
    },
}
ROLLOUT = 32  # steps
COLUMNS = ("family", "script", "sweep", "size", "round", "seconds", "megaflop", "peak memory, MiB")
COLOURS = {"PPO": "#0072b2", "SPRIG": "#d55e00"}
UNITS = {"environments": "a rollout of 32 steps", "processes": "1000 agent steps"}  # whose time it is
SIZES = {
    "environments": "environments",
    "minibatch": "transitions in a minibatch",
    "resolution": "pixels along a side",
    "entries": "entries of an observation",
    "processes": "processes",
}


@dataclass
class Args:
    rounds: int = 1
    """rounds; each measures every point once"""
    threads: int = 2
    """CPU threads of the networks and the emulator; under torchrun each process has one"""
    device: str = "cpu"
    """where the networks are: cpu or cuda"""
    output: Path | None = None
    """the data; the table beside it (default: benchmark/results/scale[_cuda].csv)"""
    point: tuple[str, str, str, int] | None = None
    """measure this one (family, script, sweep, size) in this process and print it"""


def players(script, observation_space, action_space, settings):
    leader = script.Leader(observation_space, settings).to(settings.device)
    follower = script.Follower(leader.num_features, action_space).to(settings.device)
    return leader, follower, *(script.make_optimizer(player, settings) for player in (leader, follower))


def rollout(script, settings):
    """A function that collects one of ROLLOUT steps."""
    import torch

    settings = dataclasses.replace(settings, num_steps=ROLLOUT)
    envs = script.make_envs(settings)
    leader, follower, *_ = players(script, envs.single_observation_space, envs.single_action_space, settings)
    obs = script.restart(envs, settings, 0)
    memory = script.allocate_rollout(settings, envs, torch.device(settings.device))
    return lambda: script.collect_rollout(envs, obs, leader, follower, memory)


def gradient_step(script, settings, side: int):
    """A function that takes one gradient step on random observations: frames of `side`², or `side` entries."""
    import gymnasium as gym
    import torch

    size, device = settings.minibatch_size, settings.device
    if hasattr(script, "Normaliser"):
        space, actions = gym.spaces.Box(-np.inf, np.inf, (side,), np.float32), gym.spaces.Box(-1, 1, (6,), np.float32)
        obs = torch.randn(size, side, device=device)
    else:
        space, actions = gym.spaces.Box(0, 255, (4, side, side), np.uint8), gym.spaces.Discrete(9)
        obs = torch.randint(256, (size, 4, side, side), dtype=torch.uint8, device=device)
    leader, follower, *optimizers = players(script, space, actions, settings)
    with torch.no_grad():
        logits, values = follower(leader(obs))
        policy = script.action_distribution(logits)
        taken = policy.sample()
    noise = torch.randn(2, size, device=device)
    batch = script.Batch(obs, taken, policy.log_prob(taken), values, noise[0], values + noise[1])
    step = getattr(script, "stackelberg_step", script.joint_step)
    return lambda: step(leader, follower, *optimizers, batch, settings)


def measure_point(args: Args) -> dict:
    """One point, in this process."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    family, name, sweep, size = args.point
    if sweep == "processes":
        return torchrun(family, name, size, args)
    torch.set_num_threads(args.threads)
    script = importlib.import_module(SCRIPTS[family][name])
    settings = script.Args(device=args.device, threads=args.threads)
    script.set_matmul_precision(settings.matmul_precision)
    before = resident("VmRSS")
    if sweep == "environments":
        work = rollout(script, dataclasses.replace(settings, num_envs=size))
    else:
        settings = dataclasses.replace(settings, minibatch_size=size if sweep == "minibatch" else 32)
        side = size if sweep in ("resolution", "entries") else {"atari": 84, "continuous": 17}[family]
        work = gradient_step(script, settings, side)
    on_gpu, aten = args.device != "cpu", torch.ops.aten
    fused = {  # the CPU's kernel, which the counter does not know
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *x, **_: sdpa_flop_count(*x[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *x, **_: sdpa_backward_flop_count(*x[:4]),
    }
    with torch.inference_mode() if sweep == "environments" else torch.enable_grad():
        with FlopCounterMode(display=False, custom_mapping=fused) as counter:
            work()
        times = []
        while len(times) < 5 or (sum(times) < 2 and len(times) < 200):
            start = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident("VmHWM") - before
    return {
        "seconds": statistics.median(times),
        "megaflop": counter.get_total_flops() / 1e6,
        "peak memory, MiB": memory,
    }


def torchrun(family: str, name: str, processes: int, args: Args) -> dict:
    """Seconds per 1000 agent steps of a training, start-up and its first rollout not counted."""
    import resource

    steps = {"atari": 1536, "continuous": 8704}[family]  # the first 512 are not counted
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"{ROOT / SCRIPTS[family][name]}.py", "--run-dir", f"{folder}/run", "--eval-episodes", "0"]
        command += ["--total-timesteps", str(steps), "--num-envs", "8", "--num-steps", "64", "--threads", "1"]
        command += ["--device", args.device]
        output_of(command, " ".join(command), env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = 1000 / steady_speed(f"{folder}/run")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": seconds, "megaflop": float("nan"), "peak memory, MiB": memory}


def measure(args: Args, writer) -> None:
    """All points, each written as it comes."""
    import torch

    most = torch.cuda.device_count() if args.device != "cpu" else math.inf  # processes
    points = [
        (family, name, sweep, size)
        for family, sweeps in SWEEPS.items()
        for sweep, sizes in sweeps.items()
        for size in sizes
        for name in SCRIPTS[family]
        if sweep != "processes" or size <= most
    ]
    for number in range(1, args.rounds + 1):
        for point in points:
            command = [sys.executable, __file__, "--threads", str(args.threads), "--device", args.device, "--point"]
            measured = json.loads(output_of([*command, *map(str, point)], str(point)).splitlines()[-1])
            writer.writerow([*point, number, *(f"{value:.5g}" for value in measured.values())])
            print(*point, f"{1000 * measured['seconds']:.2f} ms", file=sys.stderr)


def medians(rows: list[dict]) -> dict:
    """(family, sweep, script) -> arrays (sizes,): size, seconds, megaflop, MiB."""
    table = {}
    for row in rows:
        series = table.setdefault((row["family"], row["sweep"], row["script"]), {})
        series.setdefault(int(row["size"]), []).append([float(row[column]) for column in COLUMNS[5:]])
    return {
        key: np.array([[size, *np.median(values, axis=0)] for size, values in sorted(series.items())]).T
        for key, series in table.items()
    }


def growth(sizes: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(p, c) of values ~ c · sizes^p, by least squares through the logarithms."""
    exponent, offset = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(exponent), float(np.exp(offset))


def report(rows: list[dict], heading: str) -> str:
    """The table: the ends of each sweep, and the growth between them."""
    columns = ["", "", "sizes", "ms", "exponent of time (last part)", "of operations (last part)", "peak memory, MiB"]
    lines = []
    for (family, sweep, name), (sizes, seconds, megaflop, memory) in medians(rows).items():
        cells = [
            f"{family}: {sweep}, {UNITS.get(sweep, 'a gradient step')}",
            name,
            f"{sizes[0]:.0f} to {sizes[-1]:.0f}",
        ]
        cells += [f"{1000 * seconds[0]:,.3g} to {1000 * seconds[-1]:,.3g}"]
        for values in (seconds, megaflop):
            few = len(sizes) < 3 or not np.isfinite(values).all()
            cells += ["" if few else f"{growth(sizes, values)[0]:.2f} ({growth(sizes[-2:], values[-2:])[0]:.2f})"]
        cells += [f"{memory[0]:.0f} to {memory[-1]:.0f}"]
        lines.append(cells)
    return f"{heading}\n\n{render(columns, lines)}\n"


def draw(rows: list[dict]):
    """A row of panels per family for time, one for memory, a column per sweep."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    table = medians(rows)
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplots(4, 4, squeeze=False)
    for (family, sweep, name), (sizes, seconds, _, memory) in table.items():
        i, column = 2 * (family == "continuous"), list(SWEEPS[family]).index(sweep)
        above, below = panels[i, column], panels[i + 1, column]
        if len(sizes) > 2:
            exponent, factor = growth(sizes, seconds)
            above.plot(sizes, 1000 * seconds, "o", color=COLOURS[name], label=f"{name}, ~ size^{exponent:.2f}")
            above.plot(sizes, 1000 * factor * sizes**exponent, color=COLOURS[name], linewidth=1)
        else:
            above.plot(sizes, 1000 * seconds, "o-", color=COLOURS[name], label=name, linewidth=1)
        below.plot(sizes, memory, "o-", color=COLOURS[name], label=name, linewidth=1)
        above.set_title(f"{family}: {sweep}", fontsize=9)
        above.set_ylabel(f"ms: {UNITS.get(sweep, 'a gradient step')}", fontsize=8)
        below.set_ylabel("peak memory, MiB", fontsize=8)
        for axis in (above, below):
            axis.set_xlabel(SIZES[sweep], fontsize=8)
            axis.set_xscale("log")
            axis.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
            axis.minorticks_off()
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        above.legend(fontsize=7, frameon=False)
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}")
        above.minorticks_off()
    for axis in panels[1::2].flat:
        if axis.lines:  # once all is drawn: from then on the scale stands
            axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
            axis.legend(loc="upper left", fontsize=7, frameon=False)
    return figure


def check(args: Args) -> None:
    """Ends with a one-line error before anything is measured or written."""
    import torch

    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is less than 1")
    if args.device not in ("cpu", "cuda"):
        fail(f"--device {args.device} is neither cpu nor cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch finds no GPU here")
    if args.point:
        family, name, sweep, size = args.point
        if family not in SWEEPS or name not in SCRIPTS[family] or sweep not in SWEEPS[family] or size < 1:
            fail(f"--point {' '.join(map(str, args.point))} is not a family, PPO or SPRIG, a sweep and a size")


def main(args: Args) -> None:
    check(args)
    if args.point:
        print(json.dumps(measure_point(args)))
        return
    import torch

    output = args.output or Path(f"benchmark/results/scale{'' if args.device == 'cpu' else '_cuda'}.csv")
    heading = (
        f"`python benchmark/scale.py --rounds {args.rounds} --threads {args.threads} --device {args.device}` on "
        f"{cpu_model()}, Python {platform.python_version()}, torch {torch.__version__}."
    )
    check_output(output, ".csv", "the table goes into .md beside it")
    unfinished = output.with_suffix(".part")  # an earlier measurement stays until this one is whole
    with open(unfinished, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        measure(args, writer)
    unfinished.replace(output)
    text = report(read(output, COLUMNS), heading)
    output.with_suffix(".md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
