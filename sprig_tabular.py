# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium==1.4.0",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "numpy==2.4.6",
#     "matplotlib==3.11.2",
# ]
# ///
"""The Stackelberg-Bellman operator T_S on small MDPs: what its theory says, and where it stops.

    python sprig_tabular.py --env-id FrozenLake-v1

Paper: Martinez-Lopez, Chen, Lu, "SPRIG: Stackelberg Perception-Reinforcement Learning with Internal Game
Dynamics", arXiv 2502.14264, Eq. (13) and (14). No learning here: the leader picks one of K perceptions (partitions
of the states into cells, the finer the dearer), the follower an action per cell, and everything is computed from
the transition table of a Gymnasium toy-text environment. docs/paper.md, "The Stackelberg-Bellman operator", has the
theorem, its proof, and the claims that fail.
"""

import contextlib
import dataclasses
import heapq
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import tyro
from tqdm import tqdm

Follower = Literal["cooperative", "adversarial"]


# ==================================================================================================
# Arguments
# ==================================================================================================
@dataclass
class Args:
    # -- Environment --
    env_id: str = "FrozenLake-v1"
    """FrozenLake-v1, FrozenLake8x8-v1, CliffWalking-v1, CliffWalkingSlippery-v1 or Taxi-v4"""
    map_name: Literal["", "4x4", "8x8"] = ""
    """FrozenLake only: its map (default: the id's own)"""
    is_slippery: bool = True
    """FrozenLake only: moves go astray two times in three"""

    # -- The game --
    gamma: float = 0.99
    """discount, γ, at least 0 and less than 1"""
    lam: float = 0.003
    """price of perception, λ: a step with perception θ costs λ·C_θ(s)"""
    follower: Follower = "cooperative"
    """whether the follower maximises f, the price of perception included, or minimises it (Eq. 13 as printed)"""

    # -- What is computed --
    lambdas: tuple[float, ...] = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """prices of the sweep"""
    num_pairs: int = 200
    """random pairs (f, g) over which the contraction is measured"""
    tol: float = 1e-10
    """distance from the fixed point at which the iteration may stop"""
    max_nodes: int = 0
    """search nodes that a whole-game problem (one θ, one φ) may take (0: 10 000, fewer where states are many,
    and a quarter of that or less for one perception alone)"""
    seed: int = 1
    """seed of the random pairs and starts"""
    run_dir: str = ""
    """folder of tabular.png and results.json, new or empty (default: runs/<env>__sprig_tabular__<seed>__<time>)"""


def fail(message: str):
    """A user's mistake: one line on stderr, exit code 1, no traceback."""
    raise SystemExit(f"error: {message}")


def check_args(args: Args) -> None:
    """Refuse, before anything is computed, whatever could only go wrong later."""
    if not 0 <= args.gamma < 1:
        fail(f"--gamma must lie in [0, 1), not {args.gamma}: T_S contracts by γ")
    if not args.lambdas:
        fail("--lambdas needs at least one price")
    for name, price in [("lam", args.lam)] + [("lambdas", price) for price in args.lambdas]:
        if not 0 <= price <= 1e100:
            fail(f"--{name}: a price is finite and not negative, and at most 1e100, unlike {price}")
    if not 0 < args.tol < math.inf:
        fail(f"--tol must be positive, not {args.tol}")
    for name, least in (("num_pairs", 1), ("max_nodes", 0), ("seed", 0)):
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if not args.env_id.startswith("FrozenLake") and (args.map_name or not args.is_slippery):
        fail(f"--map-name and --is-slippery are FrozenLake's; {args.env_id} has neither")


def parse_args() -> Args:
    args = tyro.cli(Args, description=__doc__)
    if "--is-slippery" in sys.argv and not args.env_id.startswith("FrozenLake"):
        fail(f"--is-slippery is FrozenLake's; {args.env_id} has none")
    return args


# ==================================================================================================
# MDP and perceptions
# ==================================================================================================
@dataclass(frozen=True, eq=False)
class TabularMdp:
    """P[s, a, s'] (S, A, S): probability that action a in s leads to s' and the game goes on; what a row lacks to 1 is
    the probability that it ends. R[s, a] (S, A): mean reward. gamma: discount.

    `start` (S,): distribution of the first state, if known. Raises ValueError if the arrays make no discounted MDP.
    """

    P: np.ndarray
    R: np.ndarray
    gamma: float
    start: np.ndarray | None = None

    def __post_init__(self):
        P, R = np.asarray(self.P, dtype=float), np.asarray(self.R, dtype=float)
        object.__setattr__(self, "P", P)
        object.__setattr__(self, "R", R)
        if R.ndim != 2 or not R.size or P.shape != (*R.shape, R.shape[0]):
            raise ValueError(f"P must be (S, A, S) and R (S, A), not {P.shape} and {R.shape}")
        if not (np.isfinite(R).all() and (P >= 0).all() and (P.sum(-1) <= 1 + 1e-9).all()):
            raise ValueError("R must be finite, P not negative, and its rows sum to at most 1")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must lie in [0, 1), not {self.gamma}")


def make_env(env_id: str, **kwargs) -> gym.Env:
    """The bare environment. Raises ValueError, in one line, if there is none or it has no transition table."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what is wrong with the id will be said below
            env = gym.make(env_id, **kwargs).unwrapped
    except Exception as error:  # unknown, deprecated, a package is missing, wrong keyword: one kind for the caller
        raise ValueError(f"{env_id} cannot be made: {type(error).__name__}: {error}".splitlines()[0]) from error
    if not hasattr(env, "P"):
        raise ValueError(f"{env_id} has no transition table P; FrozenLake-v1, CliffWalking-v1 and Taxi-v4 have one")
    return env


def toy_text_mdp(env_id: str, gamma: float, **kwargs) -> TabularMdp:
    """The MDP of an environment's table P; a transition that ends the episode pays its reward and leads nowhere."""
    env = make_env(env_id, **kwargs)
    num_states, num_actions = int(env.observation_space.n), int(env.action_space.n)
    P, R = np.zeros((num_states, num_actions, num_states)), np.zeros((num_states, num_actions))
    for state, actions in env.P.items():
        for action, outcomes in actions.items():
            for probability, next_state, reward, terminated in outcomes:  # the same s' may come twice
                R[state, action] += probability * reward
                P[state, action, next_state] += probability * (not terminated)
    return TabularMdp(P, R, gamma, np.asarray(env.initial_state_distrib, dtype=float))


def reachable_states(mdp: TabularMdp, start: np.ndarray) -> np.ndarray:
    """(S,) whether some policy can be there, starting from `start` (S,), before the end."""
    reached = start > 0
    while (grown := reached | mdp.P[reached].any(axis=(0, 1))).sum() > reached.sum():
        reached = grown
    return reached


class Perceptions(NamedTuple):
    """K partitions of S states."""

    names: list[str]
    cells: np.ndarray  # (K, S) the cell of each state, from 0
    costs: np.ndarray  # (K, S) C_θ(s) = log(number of cells) / log(number of states), from 0 to 1


def with_costs(partitions: dict[str, np.ndarray]) -> Perceptions:
    """Perceptions from the label of each state (S,), by name; only which labels are equal counts."""
    cells = np.stack([np.unique(labels, return_inverse=True)[1] for labels in partitions.values()])  # (K, S)
    information = np.log(cells.max(1) + 1) / math.log(max(cells.shape[1], 2))
    return Perceptions([*partitions], cells, np.repeat(information[:, None], cells.shape[1], axis=1))


def grid_perceptions(num_rows: int, num_columns: int) -> Perceptions:
    """What one may notice of one's place on a grid whose states are numbered row by row."""
    row, column = np.indices((num_rows, num_columns)).reshape(2, -1)
    quadrant = 2 * (row >= (num_rows + 1) // 2) + (column >= (num_columns + 1) // 2)
    partitions = {"blind": 0 * row, "quadrant": quadrant, "row": row, "column": column, "diagonal": row + column}
    return with_costs(partitions | {"identity": np.arange(row.size)})


def toy_text_perceptions(env: gym.Env) -> tuple[Perceptions, np.ndarray, str, str]:
    """(perceptions, states to be drawn as a map (rows, columns), caption, one symbol per action)."""
    num_states = int(env.observation_space.n)
    if hasattr(env, "nrow"):  # FrozenLake
        shape, signs = (env.nrow, env.ncol), "←↓→↑"
        return grid_perceptions(*shape), np.arange(num_states).reshape(shape), "", signs
    if hasattr(env, "shape"):  # CliffWalking
        return grid_perceptions(*env.shape), np.arange(num_states).reshape(env.shape), "", "↑→↓←"
    if num_states == 500 and hasattr(env, "decode"):  # Taxi
        row, column, passenger, destination = np.unravel_index(np.arange(500), (5, 5, 5, 4))
        place, task = 5 * row + column, 4 * passenger + destination
        partitions = {"blind": 0 * row, "passenger": passenger, "task": task, "place": place}
        partitions |= {"place+dest.": 4 * place + destination, "place+pass.": 5 * place + passenger}
        scene = np.arange(0, 500, 20).reshape(5, 5) + 4 * 4 + 1  # passenger aboard, destination green
        return with_costs(partitions | {"identity": np.arange(500)}), scene, ",\npassenger aboard, to green", "↓↑→←PD"
    raise ValueError("perceptions are defined only for FrozenLake, CliffWalking and Taxi")


def per_state(perceptions: np.ndarray) -> np.ndarray:
    """The reading in which a' may depend on s' itself: whatever the leader pays for, the follower sees everything."""
    return np.broadcast_to(np.arange(perceptions.shape[1]), perceptions.shape)


# ==================================================================================================
# The operator
# ==================================================================================================
def make_operator(mdp: TabularMdp, perceptions, costs, lam: float, follower: Follower):
    """The map from f (S, A) to each perception's value (K, S, A), whose maximum over k is T_S f.

    What does not depend on f is done here, once: only the nonzero entries of P count (Taxi: 3000 of 1.5 million),
    sorted so that each run of entries is one cell z of one perception, reached from one (s, a). Raises ValueError on
    arrays that do not fit; so does the map on an f that is not finite or not (S, A).
    """
    num_states = len(mdp.R)
    cells, costs = np.asarray(perceptions), np.asarray(costs, dtype=float)
    if cells.ndim != 2 or not cells.size or cells.shape[1] != num_states or costs.shape != cells.shape:
        raise ValueError(f"perceptions and costs must be (K, {num_states}), not {cells.shape} and {costs.shape}")
    if not (np.issubdtype(cells.dtype, np.integer) and cells.min() >= 0):
        raise ValueError("perceptions must be cell indices: whole numbers, not negative")
    cells = cells.astype(np.int64)  # a small type would overflow below
    if not (np.isfinite(costs).all() and math.isfinite(lam)):
        raise ValueError("costs and lam must be finite")
    if follower not in ("cooperative", "adversarial"):
        raise ValueError(f"follower must be cooperative or adversarial, not {follower}")
    opt = np.max if follower == "cooperative" else np.min

    pair, successor = np.nonzero(mdp.P.reshape(-1, num_states))  # pair: s * A + a
    owner = np.arange(len(cells))[:, None] * mdp.R.size + pair  # (K, entries) the (k, s, a) of an entry
    group = (owner * (cells.max() + 1) + cells[:, successor]).ravel()  # (K * entries,) its (k, s, a, z)
    order = np.argsort(group, kind="stable")
    first = np.flatnonzero(np.diff(group[order], prepend=-1))  # where each (k, s, a, z) begins
    owner = owner.ravel()[order][first]
    successor = np.tile(successor, len(cells))[order]
    probability = np.tile(mdp.P[mdp.P > 0], len(cells))[order]
    paid = mdp.R - lam * costs[:, :, None]  # (K, S, A) R(s, a) − λ·C_k(s)

    def operator(q: np.ndarray) -> np.ndarray:
        if q.shape != mdp.R.shape or not np.isfinite(q).all():
            raise ValueError(f"q must be finite and of shape {mdp.R.shape}, not {q.shape}")
        terms = probability * q.T.take(successor, axis=1)  # (A, K * entries) P(s'|s, a) f(s', a')
        sums = np.add.reduceat(terms, first, axis=1)  # (A, number of (k, s, a, z)) the sum over s' in z
        future = np.bincount(owner, weights=opt(sums, axis=0), minlength=paid.size)  # one a' per cell
        return paid + mdp.gamma * future.reshape(paid.shape)

    return operator


def stackelberg_bellman(q, mdp: TabularMdp, perceptions, costs, lam: float, follower: Follower = "cooperative"):
    """(T_S q) (S, A): Eq. (13), with one action a' per cell that the leader lets the follower tell apart.

    q (S, A); perceptions (K, S) cell indices; costs (K, S). Cooperative: max over a', adversarial: min.
    """
    return make_operator(mdp, perceptions, costs, lam, follower)(np.asarray(q, dtype=float)).max(axis=0)


def solve(mdp: TabularMdp, perceptions, costs, lam: float, follower: Follower = "cooperative", tol=1e-8, q=None):
    """Iterate T_S from q (0 if not given). Returns f* (S, A), off by at most `tol`, and each sweep's residual (n,).

    Stops when the residual and the a-posteriori bound γ/(1−γ)·‖f_n − f_{n−1}‖ are at most `tol`; or after as many
    sweeps as Eq. (14) needs for that, when only rounding is left. Raises ValueError as `make_operator` does, and on a
    `tol` that is not positive.
    """
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    operator = make_operator(mdp, perceptions, costs, lam, follower)
    q = np.zeros(mdp.R.shape) if q is None else np.array(q, dtype=float)
    enough = tol * min(1, (1 - mdp.gamma) / max(mdp.gamma, 1e-9))
    residuals, granted = [], math.inf
    while not residuals or min(residuals[-1], granted) > enough:
        previous, q = q, operator(q).max(axis=0)
        residuals.append(float(np.abs(q - previous).max()))
        granted = residuals[0] * mdp.gamma ** (len(residuals) - 1)  # Eq. (14)
    return q, np.array(residuals)


def cheapest_best(values: np.ndarray, costs: np.ndarray, tol: float = 1e-9) -> np.ndarray:
    """(S, A) the perception that wins in values (K, S, A); among equals (up to `tol`), the one of least cost."""
    slack = tol * max(1.0, float(np.abs(values).max()))
    costs = np.where(values >= values.max(axis=0) - slack, np.asarray(costs)[:, :, None], math.inf)
    return costs.argmin(axis=0)


def start_value(q: np.ndarray, start: np.ndarray) -> float:
    """What f promises where the game begins, the first action being free to depend on the state."""
    return float(start @ q.max(axis=1))


# ==================================================================================================
# One perception and one policy for the whole game
# ==================================================================================================
def policy_values(mdp: TabularMdp, reward: np.ndarray, policy: np.ndarray):
    """(V (S,), Q (S, A)) of a deterministic policy (S,), exactly."""
    states = np.arange(len(policy))
    value = np.linalg.solve(np.eye(len(policy)) - mdp.gamma * mdp.P[states, policy], reward[states, policy])
    return value, reward + mdp.gamma * (mdp.P @ value)


def best_policy(mdp: TabularMdp, reward: np.ndarray, allowed: np.ndarray, policy: np.ndarray):
    """Policy iteration over the actions that `allowed` (S, A) leaves to each state: (policy, V, Q)."""
    states = np.arange(len(policy))
    while True:
        value, q = policy_values(mdp, reward, policy)
        masked = np.where(allowed, q, -math.inf)
        better = masked.max(axis=1) > q[states, policy] + 1e-11 * max(1.0, float(np.abs(value).max()))
        if not better.any():
            return policy, value, q
        policy = np.where(better, masked.argmax(axis=1), policy)


def default_nodes(num_states: int) -> int:
    """Nodes that take some seconds: each solves a few systems of S equations."""
    return max(1, min(10_000, int(2e10 / num_states**3)))


def global_equilibrium(mdp: TabularMdp, perceptions, costs, lam: float, start, max_nodes: int = 0):
    """The best (θ, φ) for the whole game: (k, action of each cell of k, value at `start`), up to rounding.

    Value: E Σ_t γ^t [R(s_t, a_t) − λ·C_k(s_t)] over the live steps, for one k and one deterministic map from cells
    to actions (where cells hide states, a random one can be worth more): what the two reach as a team, the follower
    sharing the price. `start` is a distribution (S,) or a state. Finding such a map is NP-hard in general (Littman
    1994): best-first branch and bound. A node has fixed the actions of some cells; in the others each state may act as
    it likes, an MDP whose value bounds the node. With the identity that bound is the answer at once. Raises
    ValueError, with the bounds known by then, after `max_nodes` nodes (0: see `default_nodes`).
    """
    make_operator(mdp, perceptions, costs, lam, "cooperative")  # for its checks
    num_states, num_actions = mdp.R.shape
    if np.ndim(start) == 0:
        if start not in range(num_states):
            raise ValueError(f"start must be a state, 0 to {num_states - 1}, or a distribution, not {start}")
        start = np.eye(num_states)[start]
    start = np.asarray(start, dtype=float)
    if start.shape != (num_states,) or not ((start >= 0).all() and math.isclose(start.sum(), 1, abs_tol=1e-6)):
        raise ValueError(f"start must be a state or a distribution over {num_states} states")
    sizes, reached = [int(np.max(cells)) + 1 for cells in perceptions], reachable_states(mdp, start)  # of each k; (S,)
    perceptions, costs = np.asarray(perceptions)[:, reached], np.asarray(costs, dtype=float)[:, reached]
    start, num_states = start[reached], int(reached.sum())
    mdp = TabularMdp(mdp.P[reached][:, :, reached], mdp.R[reached], mdp.gamma)
    rewards = mdp.R - lam * costs[:, :, None]  # (K, S, A)
    max_nodes = max_nodes or default_nodes(num_states)
    best, queue, nodes = (-math.inf, 0, None), [], 0

    def add(k: int, actions: np.ndarray, policy: np.ndarray) -> np.ndarray:
        """Bound a node, try the policy that comes of it, and queue what is still open. actions: -1 is "none yet"."""
        nonlocal best, nodes
        nodes += 1
        cells, fixed = perceptions[k], actions[perceptions[k]]  # (S,) each
        allowed = (fixed[:, None] < 0) | (fixed[:, None] == np.arange(num_actions))
        policy, value, q = best_policy(mdp, rewards[k], allowed, np.where(fixed < 0, policy, fixed))
        bound, slack = float(start @ value), 1e-9 * max(1.0, float(np.abs(value).max()))
        if bound <= best[0] + slack:
            return policy
        flow = np.eye(num_states) - mdp.gamma * mdp.P[np.arange(num_states), policy]
        weight = np.linalg.solve(flow.T, start) + 1e-6  # (S,) discounted visits; the rounded policy may go elsewhere
        loss = np.zeros((len(actions), num_actions))  # of one action for the whole cell, to first order
        np.add.at(loss, cells, weight[:, None] * (value[:, None] - q))
        rounded = np.where(actions < 0, loss.argmin(axis=1), actions)
        attained = float(start @ policy_values(mdp, rewards[k], rounded[cells])[0])
        if attained > best[0] + slack:
            best = (attained, k, rounded)
        undecided = np.flatnonzero(actions < 0)
        if bound > best[0] + slack and len(undecided):
            branch = undecided[loss[undecided].min(axis=1).argmax()]
            heapq.heappush(queue, (-bound, nodes, k, actions, policy, branch))
        return policy

    policy = np.zeros(num_states, dtype=int)
    for k, size in enumerate(sizes):
        policy = add(k, np.full(size, -1), policy)
    while queue and -queue[0][0] > best[0] + 1e-9 * max(1.0, abs(best[0])):
        bound, _, k, actions, policy, branch = heapq.heappop(queue)
        if nodes >= max_nodes:
            raise ValueError(f"not found within {nodes} nodes; its value lies in [{best[0]:.5g}, {-bound:.5g}]")
        for action in range(num_actions):
            child = actions.copy()
            child[branch] = action
            add(k, child, policy)
    return best[1], best[2], best[0]


# ==================================================================================================
# Measurements
# ==================================================================================================
def contraction_factors(operator, mdp: TabularMdp, pairs: Iterable, rng: np.random.Generator, scale=1.0) -> dict:
    """‖T_S f − T_S g‖ / ‖f − g‖ over random pairs, and over pairs that differ by a constant, which are the worst."""
    factors = {"random": [], "shifted": []}
    for _ in pairs:
        f = rng.normal(scale=scale, size=mdp.R.shape)
        for kind, g in (("random", rng.normal(scale=scale, size=f.shape)), ("shifted", f + rng.normal(scale=scale))):
            difference = operator(f).max(axis=0) - operator(g).max(axis=0)
            factors[kind].append(float(np.abs(difference).max() / np.abs(f - g).max()))
    return factors


def error_curve(operator, q: np.ndarray, fixed_point: np.ndarray, floor: float) -> list[float]:
    """‖T_Sⁿ q − f*‖ for n = 0, 1, ... until it is at most `floor`, the accuracy of f* (or 100 000 values)."""
    errors = [float(np.abs(q - fixed_point).max())]
    while errors[-1] > floor and len(errors) < 100_000:
        q = operator(q).max(axis=0)
        errors.append(float(np.abs(q - fixed_point).max()))
    return errors


def game(P, R, gamma, cells, costs):
    """(MDP, cells (K, S), costs (K, S)) from cells and one cost per perception."""
    return TabularMdp(P, R, gamma), np.array(cells), np.repeat(np.array(costs, dtype=float)[:, None], len(R), axis=1)


def small_games() -> dict[str, tuple]:
    """Games on which the printed claims fail, by name, each as `game` returns it."""
    # A fork leads left or right by chance; left, the first action pays 1, right the second; then the game is over.
    P, R = np.zeros((3, 2, 3)), np.zeros((3, 2))
    P[0, :, 1:], R[1, 0], R[2, 1] = 0.5, 1, 1
    fork = game(P, R, 0.9, [[0, 0, 0], [0, 1, 2]], [0, 1])
    # The same for ever: after the fork an empty corridor leads back to it.
    P, R = np.zeros((4, 2, 4)), np.zeros((4, 2))
    P[0, :, 1:3], P[1:3, :, 3], P[3, :, 0], R[1, 0], R[2, 1] = 0.5, 1, 1, 1, 1
    circuit = game(P, R, 0.9, [[0, 0, 0, 0], [0, 1, 2, 3]], [0, 1])
    # Two states in turn, each with a right action of its own: nothing is random, nothing is seen.
    P, R = np.zeros((2, 2, 2)), np.eye(2)
    P[0, :, 1] = P[1, :, 0] = 1
    clock = game(P, R, 0.9, [[0, 0]], [0])
    # Two rooms that look alike, each with a right action that pays 1 and leads to the other; the wrong one costs 1.
    P = np.array([[[0.0, 1], [1, 0]]] * 2)
    rooms = game(P, np.array([[1.0, -1], [-1, 1]]), 0.9, [[0, 0]], [0])
    # The first action ends the game, the second pays a little and stays, which costs perception at every step.
    P = np.array([[[0.0], [1]]])
    stay = game(P, np.array([[0, 0.01]]), 0.9, [[0]], [1])
    return {"fork": fork, "circuit": circuit, "clock": clock, "rooms": rooms, "stay": stay}


def counter_examples() -> dict[str, dict[str, float]]:
    """What the printed claims come to in `small_games`: by claim, its numbers, all of them values at the start."""
    fork, circuit, clock, rooms, stay = small_games().values()

    def value(case, lam, follower="cooperative"):
        """(f* at the first state under its best action, the perception that wins there)."""
        mdp, cells, costs = case
        f, _ = solve(mdp, cells, costs, lam, follower, tol=1e-12)
        winners = cheapest_best(make_operator(mdp, cells, costs, lam, follower)(f), costs)  # (S, A)
        return float(f[0].max()), int(winners[0, f[0].argmax()])

    def worth(case, lam, k, policy):
        """What one perception k and one policy (S, A), the probability of each action, are worth at the first state."""
        mdp, _, costs = case
        reward = ((mdp.R - lam * costs[k][:, None]) * policy).sum(axis=1)
        flow = np.eye(len(policy)) - mdp.gamma * np.einsum("sa,sat->st", policy, mdp.P)
        return float(np.linalg.solve(flow, reward)[0])

    mdp, cells, costs = fork
    cases = {}
    (seeing, bought), (free, chosen) = value(fork, 0.1), value((mdp, per_state(cells), costs), 0.1)
    f, _ = solve(*fork, 0.1)
    targets = mdp.R[0, 0] - 0.1 * costs[:, 0] + mdp.gamma * f.max(axis=1)[:, None]  # (S, K) for each s' after state 0
    cases["an action per state: the cheapest perception always wins"] = {
        "T_S, action per cell": seeing,
        "its perception": bought,
        "T_S, action per state": free,
        "its choice": chosen,
        "T_S from one sampled s', on average": float(mdp.P[0, 0] @ targets.max(axis=1)),
        "what that choice is worth": global_equilibrium(mdp, cells[:1], costs[:1], 0.1, 0)[2],
    }
    printed, blinding = value(fork, 0.1, "adversarial")
    cases["max-min is not the cooperative equilibrium: the leader blinds its follower"] = {
        "max-max": seeing,
        "max-min": printed,
        "its perception": blinding,
        "max-min at λ = 0, all seen": value((mdp, cells[1:], costs[1:]), 0.0, "adversarial")[0],
    }
    k, _, whole = global_equilibrium(*circuit, 0.1, 0)
    cases["one θ for the whole game can be worth less than f*"] = {
        "f*": value(circuit, 0.1)[0],
        "best (θ, φ)": whole,
        "its perception": k,
    }
    cases["where nothing is random, T_S makes blindness free"] = {
        "f*, blind": value(clock, 0.0)[0],
        "best blind policy": global_equilibrium(*clock, 0.0, 0)[2],
    }
    cases["what cannot tell states apart may do better by chance"] = {
        "f*": value(rooms, 0.0)[0],
        "best deterministic φ": global_equilibrium(*rooms, 0.0, 0)[2],
        "a coin": worth(rooms, 0.0, 0, np.full((2, 2), 0.5)),
    }
    cases["a follower that does not share the price (Eq. 7) answers otherwise"] = {
        "f*": value(stay, 0.1)[0],
        "best (θ, φ)": global_equilibrium(*stay, 0.1, 0)[2],
        "the leader's, if the follower maximises the return alone": worth(stay, 0.1, 0, np.array([[0.0, 1]])),
    }
    first, right = np.array([[1.0, 0]] * 3), np.array([[1.0, 0], [1, 0], [0, 1]])  # policies at the fork
    cases["moving at once, the players can rest where moving first would not"] = {
        "blind, always the first action": worth(fork, 0.1, 0, first),
        "only the leader deviates": worth(fork, 0.1, 1, first),
        "only the follower deviates": max(worth(fork, 0.1, 0, np.array([row] * 3)) for row in np.eye(2)),
        "best (θ, φ)": worth(fork, 0.1, 1, right),
    }
    scale, rng = 10_000.0, np.random.default_rng(0)  # of f and g, so that the winning perception changes between them
    dear = np.repeat([[0.0], [4000.0]], 4, axis=1)
    operator = make_operator(circuit[0], circuit[1], dear, 1.0, "cooperative")
    factors = contraction_factors(operator, circuit[0], range(200), rng, scale)
    cases["the bound does not need C ≤ 1"] = {
        "γ": circuit[0].gamma,
        "largest factor, C up to 4000": max(factors["random"] + factors["shifted"]),
    }
    return cases


def whole_game(mdp: TabularMdp, perceptions: Perceptions, lam: float, max_nodes: int) -> dict:
    """`global_equilibrium` as a record, or the reason why it was refused."""
    try:
        k, actions, value = global_equilibrium(mdp, *perceptions[1:], lam, mdp.start, max_nodes)
    except ValueError as error:
        return {"refused": str(error)}
    return {"value": value, "perception": perceptions.names[k], "actions": actions.tolist()}


def alone(mdp: TabularMdp, perceptions: Perceptions, args: Args) -> dict[str, dict]:
    """What each perception is worth for the whole game if there is no other."""
    records = {}
    for k, name in enumerate(tqdm(perceptions.names, desc="perceptions", dynamic_ncols=True)):
        only = Perceptions([name], perceptions.cells[k : k + 1], perceptions.costs[k : k + 1])
        records[name] = whole_game(mdp, only, args.lam, args.max_nodes or default_nodes(len(mdp.R)) // 4 + 1)
    return records


def sweep_prices(mdp: TabularMdp, perceptions: Perceptions, args: Args) -> list[dict]:
    """At each price: the start's value under each reading, and what share of the live (s, a) each perception wins."""
    live = (mdp.P.sum(-1) > 0) & reachable_states(mdp, mdp.start)[:, None]  # (S, A) after which there is more to see
    every_state = per_state(perceptions.cells)
    readings = {"T_S": (perceptions.cells, "cooperative"), "per state": (every_state, "cooperative")}
    readings["max-min"] = (perceptions.cells, "adversarial")
    rows, fixed_points = [], dict.fromkeys(readings)
    for lam in tqdm(args.lambdas, desc="prices", dynamic_ncols=True):
        rows.append({"lambda": lam, "whole game": whole_game(mdp, perceptions, lam, args.max_nodes)})
        for name, (cells, follower) in readings.items():
            q, _ = solve(mdp, cells, perceptions.costs, lam, follower, args.tol, fixed_points[name])
            fixed_points[name] = q  # where the next price starts
            values = make_operator(mdp, cells, perceptions.costs, lam, follower)(q)
            winners = cheapest_best(values, perceptions.costs)[live]
            shares = np.bincount(winners, minlength=len(cells)) / max(1, winners.size)
            shares = dict(zip(perceptions.names, shares.tolist()))
            rows[-1][name] = {"value": start_value(q, mdp.start), "shares": shares}
    return rows


# ==================================================================================================
# Report
# ==================================================================================================
def load_matplotlib():
    """matplotlib's Figure, which draws without a screen, and its colours."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        fail("the plot needs matplotlib: pip install matplotlib==3.11.2")
    return Figure, colormaps


def print_table(title: str, header: list[str], rows: list[list]) -> None:
    texts = [header] + [[x if isinstance(x, str) else f"{x:.5g}" for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    print(f"\n{title}")
    for row in texts:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(row, widths)))


def most_bought(reading: dict) -> str:
    name = max(reading["shares"], key=reading["shares"].get)
    return f"{name} {100 * reading['shares'][name]:.0f}%"


def interval(record: dict):
    """A whole game's value, or the bounds at which its search was given up."""
    return record["value"] if "value" in record else record["refused"].split(" in ")[-1]


def report(results: dict, perceptions: Perceptions) -> None:
    arguments, curves = results["arguments"], results["errors"]
    gamma, lam = arguments["gamma"], arguments["lam"]
    longest = max(map(len, curves.values()))
    shown = [0] + [step * 10**power for power in range(6) for step in (1, 2, 5) if step * 10**power < longest]
    rows = []
    for n in shown:
        rows.append([f"{n}", curves["from 0"][0] * gamma**n])
        rows[-1] += [curve[n] if n < len(curve) else "" for curve in curves.values()]
    title = f"Distance from the fixed point after n sweeps, λ = {lam:g}, {arguments['follower']} follower"
    print_table(title, ["n", "γⁿ bound, from 0", *curves], rows)
    print(f"  fixed points found from these starts differ by at most {results['starts_differ']:.1e}")

    rows = [[kind, np.mean(factors), max(factors)] for kind, factors in results["factors"].items()]
    title = f"Contraction factor over {arguments['num_pairs']} pairs (f, g), to be at most γ = {gamma:g}"
    print_table(title, ["pairs", "mean", "largest"], rows)

    rows = []
    for row in results["sweep"]:
        rows.append([f"{row['lambda']:g}"])
        for reading in ("T_S", "per state", "max-min"):
            rows[-1] += [row[reading]["value"], most_bought(row[reading])]
        rows[-1] += [interval(row["whole game"]), row["whole game"].get("perception", "refused")]
    header = ["λ", "T_S", "buys", "a' per state", "buys", "max-min", "buys", "one (θ, φ)", "θ"]
    print_table("Value at the start, and the perception that wins most (s, a), as the price λ rises", header, rows)

    rows = []
    for name, cells, costs, record in zip(*perceptions, results["alone"].values()):
        rows.append([name, f"{cells.max() + 1}", costs[0], interval(record)])
    title = f"One θ for the whole game, λ = {lam:g} (in brackets: bounds where the search was refused)"
    print_table(title, ["θ", "cells", "cost", "best deterministic φ"], rows)
    for title, numbers in results["counter_examples"].items():
        print(f"\nCounter-example: {title}")
        print("  " + ", ".join(f"{name} {number:.4g}" for name, number in numbers.items()))


def draw(path: Path, results: dict, perceptions: Perceptions, maps: list, scene: np.ndarray, signs: str) -> None:
    """tabular.png: six panels. maps: (title, θ of each state (S,) or -1, action of each state, cell of each state)."""
    Figure, colormaps = load_matplotlib()
    figure = Figure(figsize=(16, 8.6), dpi=100, layout="constrained")
    (errors, factors, first_map), (values, shares, second_map) = figure.subplots(2, 3, width_ratios=(4, 4, 3))
    gamma, sweep = results["arguments"]["gamma"], results["sweep"]
    figure.suptitle(f"The Stackelberg–Bellman operator on {results['name']}, γ = {gamma:g}", fontsize=15)
    shades = colormaps["cividis_r"](np.linspace(0.04, 0.96, len(perceptions.names)))  # the darker, the more is seen

    curves = results["errors"]
    longest, farthest = max(map(len, curves.values())), max(curve[0] for curve in curves.values())
    bound = farthest * gamma ** np.arange(longest)
    errors.semilogy(bound, "k--", lw=1.5, label="γⁿ bound of the farthest")
    for (start, curve), colour in zip(curves.items(), ("#0072B2", "#D55E00", "#009E73", "#CC79A7")):
        errors.semilogy(curve, color=colour, lw=2, label=start)
    errors.set(title="Every sweep contracts", xlabel="sweeps n", ylabel="distance from f*, largest entry")
    errors.set_ylim(max(min(curve[-1] for curve in curves.values()), 1e-8), 5 * farthest)

    low = min(map(min, results["factors"].values()))
    bins = np.linspace(low - 0.01, gamma + 0.01, 60)
    for kind, colour, label in (("random", "#56B4E9", "random f, g"), ("shifted", "#E69F00", "g = f + constant")):
        factors.hist(results["factors"][kind], bins=bins, color=colour, label=label)
    factors.axvline(gamma, color="k", ls="--", lw=1.5, label=f"γ = {gamma:g}")
    factors.set(title="... by a factor ≤ γ, and no bound is better", ylabel="pairs", yscale="log")
    factors.set_xlabel("‖T_S f − T_S g‖ / ‖f − g‖")

    places, prices = np.arange(len(sweep)), [row["lambda"] for row in sweep]
    ticks = [f"{price:g}" if price == 0 or price >= 0.001 else f"{price:.0e}".replace("e-0", "e-") for price in prices]
    lines = {
        "per state": ("T_S, a' per state", "#E69F00", "^"),
        "T_S": ("T_S, a' per cell", "#0072B2", "o"),
        "whole game": ("one (θ, φ) for the whole game", "#009E73", "s"),
        "max-min": ("max-min, as printed", "#CC79A7", "v"),
    }
    others = [row[key]["value"] for row in sweep for key in lines if key != "max-min" and "value" in row[key]]
    low, high = min(others), max(others)
    for key, (label, colour, marker) in lines.items():
        heights = [row[key].get("value", math.nan) for row in sweep]
        label += "" if np.isfinite(heights).any() else " (refused)"
        if key == "max-min" and max(heights) < low - 2 * (high - low):  # too far below to share an axis
            heights, label = [math.nan], f"{label}: {max(heights):.0f} or less"
        values.plot(places[: len(heights)], heights, marker=marker, color=colour, label=label, lw=2, ms=6)
    values.set(title="What the start is worth", xlabel="price of perception λ", ylabel="value")
    base = np.zeros(len(sweep))
    for name, shade in zip(perceptions.names, shades):
        heights = np.array([row["T_S"]["shares"][name] for row in sweep])
        shares.bar(places, heights, 0.85, bottom=base, color=shade, edgecolor="white", lw=0.5, label=name)
        base += heights
    shares.set(title="What the leader buys under T_S", xlabel="price of perception λ", ylabel="share of live (s, a)")
    for axis in (values, shares):
        axis.set_xticks(places, ticks)
    for axis in (errors, factors, values):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    errors.legend(fontsize=9)
    for axis in (factors, values):
        axis.legend(fontsize=9, ncols=2 if axis is values else 3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    shares.legend(fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    for axis, content in zip((first_map, second_map), maps):
        draw_map(axis, *content, scene, shades, signs)
    figure.savefig(path)


def draw_map(axis, title: str, bought, actions, cells, scene: np.ndarray, shades: np.ndarray, signs: str) -> None:
    """Colour: the perception of each state. Sign: its action. Lines: borders between cells. Grey: never there."""
    axis.set_title(title, fontsize=11)
    axis.set(xlim=(-0.5, scene.shape[1] - 0.5), ylim=(scene.shape[0] - 0.5, -0.5), aspect="equal")
    axis.set_axis_off()
    sides, size = np.array([-0.5, 0.5, 0.5, -0.5]), 130 / max(scene.shape)  # size: of the signs, in points
    for (row, column), state in np.ndenumerate(scene):
        colour = "#e4e4e4" if bought[state] < 0 else shades[bought[state]]
        axis.fill(column + sides, row + np.sort(sides), color=colour)
        if bought[state] >= 0:
            ink = "black" if np.dot(colour[:3], (0.3, 0.6, 0.1)) > 0.5 else "white"
            axis.text(column, row, signs[actions[state]], color=ink, ha="center", va="center", fontsize=size)
        if column and cells[scene[row, column - 1]] != cells[state]:
            axis.plot([column - 0.5] * 2, [row - 0.5, row + 0.5], color="white", lw=2)
        if row and cells[scene[row - 1, column]] != cells[state]:
            axis.plot([column - 0.5, column + 0.5], [row - 0.5] * 2, color="white", lw=2)


# ==================================================================================================
# Main
# ==================================================================================================
def start_run(args: Args) -> Path:
    """The folder of the results, which exists and is empty when this returns."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{args.env_id.replace('/', '_')}__sprig_tabular__{args.seed}__{stamp}"
    run_dir = Path(args.run_dir or f"runs/{name}")
    try:
        if args.run_dir:
            run_dir.mkdir(parents=True, exist_ok=True)
            if any(run_dir.iterdir()):
                fail(f"--run-dir {run_dir} is not empty; nothing was changed")
        else:
            run_dir = make_folder(run_dir)
        probe = run_dir / "results.json"
        probe.touch()
        probe.unlink()
    except OSError as error:
        fail(f"--run-dir {run_dir} cannot be written: {error.strerror}")
    return run_dir


def make_folder(path: Path) -> Path:
    """Make a folder of that name, or, if there is one (of a run started in the same second), with -1, -2, ... added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        folder = path.with_name(f"{path.name}-{number}") if number else path
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def main(args: Args) -> dict:
    """Compute, print, draw, save. Returns what results.json holds."""
    check_args(args)
    load_matplotlib()  # before the work, not after it
    kwargs = {"map_name": args.map_name} if args.map_name else {}
    kwargs |= {} if args.is_slippery else {"is_slippery": False}
    try:
        env = make_env(args.env_id, **kwargs)
        mdp = toy_text_mdp(args.env_id, args.gamma, **kwargs)
        perceptions, scene, caption, signs = toy_text_perceptions(env)
    except ValueError as error:
        fail(str(error))
    run_dir = start_run(args)
    (num_states, num_actions), (names, cells, costs) = mdp.R.shape, perceptions
    name = args.env_id + (f" {args.map_name}" if args.map_name else "") + ("" if args.is_slippery else ", not slippery")
    print(f"{name}: {num_states} states, {num_actions} actions, {len(names)} perceptions")

    rng = np.random.default_rng(args.seed)
    operator = make_operator(mdp, cells, costs, args.lam, args.follower)
    fixed_point, _ = solve(mdp, cells, costs, args.lam, args.follower, args.tol)
    scale = 1 + float(np.abs(fixed_point).max())
    starts = {
        "from 0": np.zeros(mdp.R.shape),
        "from far above": np.full(mdp.R.shape, 5 * scale),
        "from noise": rng.normal(scale=2 * scale, size=mdp.R.shape),
    }
    others = [solve(mdp, cells, costs, args.lam, args.follower, args.tol, q)[0] for q in starts.values()]
    floor = 10 * args.tol + 1e-13 * scale
    results = {
        "arguments": dataclasses.asdict(args),
        "name": name,
        "value": start_value(fixed_point, mdp.start),
        "starts_differ": max(float(np.abs(other - fixed_point).max()) for other in others),
        "errors": {start: error_curve(operator, q, fixed_point, floor) for start, q in starts.items()},
        "factors": contraction_factors(operator, mdp, tqdm(range(args.num_pairs), desc="pairs"), rng),
        "sweep": sweep_prices(mdp, perceptions, args),
        "alone": alone(mdp, perceptions, args),
        "whole_game": whole_game(mdp, perceptions, args.lam, args.max_nodes),
        "counter_examples": counter_examples(),
    }

    winners = cheapest_best(operator(fixed_point), costs)  # (S, A)
    greedy, states, reached = fixed_point.argmax(axis=1), np.arange(num_states), reachable_states(mdp, mdp.start)
    title = f"T_S at λ = {args.lam:g}: what it buys\nfor the next step{caption}"
    maps = [(title, np.where(reached, winners[states, greedy], -1), greedy, states)]
    whole, title = results["whole_game"], f"One θ for the whole game at λ = {args.lam:g}:\n"
    if "value" in whole:
        k = names.index(whole["perception"])
        title += f"{names[k]}, value {whole['value']:.3g}{caption}"
        maps.append((title, np.where(reached, k, -1), np.array(whole["actions"])[cells[k]], cells[k]))
    else:
        maps.append((title + f"refused, value in {interval(whole)}", np.full(num_states, -1), greedy, states))
    report(results, perceptions)
    try:
        draw(run_dir / "tabular.png", results, perceptions, maps, scene, signs)
        (run_dir / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        fail(f"{run_dir} cannot be written: {error.strerror}")
    print(f"\nplot and numbers saved in {run_dir}")
    return results


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        fail("interrupted; nothing was saved")
