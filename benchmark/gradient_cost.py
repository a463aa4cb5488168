"""What the leader's total derivative costs and how much it corrects (the tables of docs/paper.md), and what
--matmul-precision bfloat16 does to the gradients (docs/speed.md).

    python benchmark/gradient_cost.py

Minibatches of real rollouts (BeamRider, HalfCheetah) at the scripts' own settings, on one thread, after a short
warm-up with the first-order gradient. Time: each method takes the whole step (leader and follower) on the same
minibatches in turn, on its own copy of the agent; the median of the ratios to first-order, since a busy machine
slows all of them. Memory: what steps add to the resident memory of a process of their own, at the peak (Linux only).
"""

import copy
import ctypes
import gc
import multiprocessing
import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from speed import cpu_model

VARIANTS = {
    "first-order": {},
    "unrolled, 1 step": {"leader_gradient": "unrolled"},
    "unrolled, 5 steps": {"leader_gradient": "unrolled", "unroll_steps": 5},
    "implicit, 10 iterations": {"leader_gradient": "implicit", "implicit_damping": 1e3, "cg_tolerance": 0.0},
}
SCALES = {f"unrolled, η = {x:g}": {"leader_gradient": "unrolled", "unroll_step_size": x} for x in (2e-1, 2e-2, 2e-3)}
LONG = {"leader_gradient": "implicit", "cg_iterations": 200}  # whatever still is not solved met negative curvature
SCALES |= {f"implicit, λ = {x:g}": {**LONG, "implicit_damping": x} for x in (5.0, 50.0, 500.0)}


@dataclass
class Args:
    minibatches: int = 16
    """minibatches that each method steps on"""
    warm_up: int = 512
    """transitions that the agent has learnt from by then"""


def prepare(name: str, cost: Args):
    """(script, its arguments, players and optimizers, minibatches of a fresh rollout)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    script = __import__(name)
    args = script.Args(threads=1, num_envs=4, update_epochs=1)
    script.set_matmul_precision(args.matmul_precision)
    size = cost.minibatches * args.minibatch_size
    envs = script.make_envs(args)
    leader = script.Leader(envs.single_observation_space, args)
    follower = script.Follower(leader.num_features, envs.single_action_space)
    optimizers = [script.make_optimizer(player, args) for player in (leader, follower)]
    obs = script.restart(envs, args, 0)
    for transitions in (cost.warm_up, size):
        args = replace(args, num_steps=transitions // args.num_envs)
        rollout = script.allocate_rollout(args, envs, torch.device("cpu"))
        obs, _ = script.collect_rollout(envs, obs, leader, follower, rollout)
        batch = script.make_batch(rollout, leader, replace(args, norm_adv="rollout"))
        if transitions == cost.warm_up:
            script.update(leader, follower, *optimizers, batch, args)
            if name == "sprig_continuous":
                leader.normaliser.observe(batch.obs)
    envs.close()
    indices = torch.randperm(size).split(args.minibatch_size)
    minibatches = [script.select_minibatch(batch, rows, args) for rows in indices]
    return script, args, (leader, follower, *optimizers), minibatches


def own_copy(script, args, agent):
    """Players and optimizers that nobody else moves; the optimizers begin anew."""
    leader, follower = copy.deepcopy(agent[:2])
    return leader, follower, *(script.make_optimizer(player, args) for player in (leader, follower))


def step_times(name: str, cost: Args) -> dict[str, list[float]]:
    """Seconds of each variant's steps."""
    script, args, agent, minibatches = prepare(name, cost)
    agents = {variant: own_copy(script, args, agent) for variant in VARIANTS}
    seconds = {variant: [] for variant in VARIANTS}
    for minibatch in [minibatches[0], *minibatches]:  # the first one twice: it warms up, and is then left out
        for variant, changes in VARIANTS.items():
            start = time.perf_counter()
            script.stackelberg_step(*agents[variant], minibatch, replace(args, **changes))
            seconds[variant].append(time.perf_counter() - start)
    return {variant: values[1:] for variant, values in seconds.items()}


def resident(key: str) -> float:
    """MiB; VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure_memory(name: str, variant: str, cost: Args, queue) -> None:
    script, args, agent, minibatches = prepare(name, cost)
    args = replace(args, **VARIANTS[variant])
    script.stackelberg_step(*agent, minibatches[0], args)  # buffers that stay
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    for minibatch in minibatches[:3]:
        script.stackelberg_step(*agent, minibatch, args)
    queue.put(resident("VmHWM") - before)


def peak_memory(name: str, variant: str, cost: Args) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(name, variant, replace(cost, minibatches=4), queue))
    process.start()
    process.join()
    return queue.get(timeout=10)


def corrections(name: str, cost: Args) -> dict[str, tuple[float, float, str]]:
    """Variant -> median ratio and cosine over minibatches, and how many solves met their tolerance."""
    script, args, agent, minibatches = prepare(name, cost)
    table = {}
    for variant, changes in SCALES.items():
        own, infos = own_copy(script, args, agent), []
        for minibatch in minibatches:
            infos.append(script.stackelberg_step(*own, minibatch, replace(args, **changes)))
        ratio, cosine = (
            statistics.median(info[f"leader/correction_{key}"].item() for info in infos) for key in ("ratio", "cosine")
        )
        solved = [info["leader/cg_residual"] <= args.cg_tolerance for info in infos if "leader/cg_residual" in info]
        table[variant] = ratio, cosine, f"{sum(solved)} of {len(solved)}" if solved else ""
    return table


def bfloat16_errors(name: str, cost: Args) -> dict[str, tuple[float, float]]:
    """Player -> (norm of bfloat16's change of its gradient over the gradient's, cosine): medians of the minibatches.

    The gradients are those of the two losses at the same θ and φ, before anybody moves.
    """
    script, args, (leader, follower, *_), minibatches = prepare(name, cost)
    errors = {"leader": [], "follower": []}
    for minibatch in minibatches:
        gradients = []
        for leader.low_precision in (False, True):
            torch.manual_seed(0)  # the same rows for the cost
            features, attention = leader(minibatch.obs, num_rows=script.cost_rows(args))
            logits, values = follower(features)
            cost_now = script.perception_cost(attention, args.perception_cost)
            loss, _ = script.leader_loss(logits, values, cost_now, minibatch, args)
            theta = script.differentiate(loss, list(leader.parameters()), retain_graph=True)
            loss, _ = script.follower_loss(logits, values, minibatch, args)
            phi = script.differentiate(loss, list(follower.parameters()))
            gradients.append([script.flatten(slopes) for slopes in (theta, phi)])
        for player, exact, rounded in zip(errors, *gradients):
            errors[player].append(((rounded - exact).norm() / exact.norm(), torch.cosine_similarity(exact, rounded, 0)))
    return {player: tuple(torch.tensor(pairs).median(0).values.tolist()) for player, pairs in errors.items()}


def main(cost: Args) -> None:
    print(f"{cpu_model()}, one thread, Python {platform.python_version()}, torch {torch.__version__}.")
    print("\n| | gradient | ms per minibatch | time over first-order | memory of a step, MiB | over first-order |")
    print("|-|-|-|-|-|-|")
    names = {"sprig_atari": "Atari", "sprig_continuous": "continuous"}
    for name, shapes in names.items():
        seconds = step_times(name, cost)
        memory = {variant: peak_memory(name, variant, cost) for variant in VARIANTS}
        for variant in VARIANTS:
            ratios = [a / b for a, b in zip(seconds[variant], seconds["first-order"])]
            print(
                f"| {shapes} | {variant} | {1000 * statistics.median(seconds[variant]):.0f} | "
                f"{statistics.median(ratios):.2f} | {memory[variant]:.0f} | "
                f"{memory[variant] / memory['first-order']:.2f} |",
                flush=True,
            )
    print("\n| | gradient | correction over first-order, before the clamp | cosine, after it | solves that met 1e-3 |")
    print("|-|-|-|-|-|")
    for name, shapes in names.items():
        for variant, (ratio, cosine, solved) in corrections(name, cost).items():
            print(f"| {shapes} | {variant} | {ratio:.2f} | {cosine:.2f} | {solved} |", flush=True)
    print("\n| gradient in bfloat16 | error over the gradient's norm | cosine |\n|-|-|-|")
    for player, (error, cosine) in bfloat16_errors("sprig_atari", cost).items():
        print(f"| {player}'s, Atari | {error:.3f} | {cosine:.4f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
