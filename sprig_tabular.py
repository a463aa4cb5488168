"""The Stackelberg-Bellman operator T_S on small MDPs: what holds, what does not.

    python sprig_tabular.py --env-id FrozenLake-v1

Paper: Martinez-Lopez, Chen, Lu, "SPRIG: Stackelberg Perception-Reinforcement Learning with Internal Game Dynamics",
arXiv 2502.14264, Eq. (13) and (14). No learning here: the leader picks one of K perceptions (partitions of the states
into cells, the finer the dearer), the follower an action per cell, and everything is computed from the transition table
of a Gymnasium toy-text environment. Theorem, proof and the claims that fail: docs/paper.md.
"""

import contextlib
import functools
import heapq
import json
import math
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure

Follower = Literal["cooperative", "adversarial"]


# ==================================================================================================
# Arguments
# ==================================================================================================
@dataclass
class Args:
    env_id: str = "FrozenLake-v1"  # FrozenLake-v1, FrozenLake8x8-v1, CliffWalking-v1, CliffWalkingSlippery-v1, Taxi-v4
    map_name: Literal["", "4x4", "8x8"] = ""  # FrozenLake only: its map, if not the id's own
    is_slippery: bool = True  # as the id has it; with --no-is-slippery no move goes astray

    gamma: float = 0.99  # discount, γ, at least 0 and less than 1
    lam: float = 0.003  # price of perception, λ: a step with perception θ costs λ·C_θ(s)
    follower: Follower = "cooperative"  # maximises f, the price included, or minimises it (Eq. 13 as printed)

    lambdas: tuple[float, ...] = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # prices of the sweep, --lam besides
    num_pairs: int = 200  # random pairs (f, g) over which the contraction is measured
    tol: float = 1e-10  # distance from the fixed point at which the iteration may stop
    max_nodes: int = 0  # search nodes that a whole-game problem (one θ, one φ) may take (0: what takes some seconds)
    seed: int = 1  # of the random pairs and starts
    run_dir: str = ""  # new or empty folder for the results (default: runs/<env>__sprig_tabular__<seed>__<time>)

    def __post_init__(self):
        for name, least in (("num_pairs", 1), ("max_nodes", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"--gamma must be at least 0 and less than 1, not {self.gamma}: T_S contracts by γ")
        if not 0 < self.tol < math.inf:
            raise ValueError(f"--tol must be positive, not {self.tol}")
        for price in (self.lam, *self.lambdas):
            if not 0 <= price <= 1e100:
                raise ValueError(f"--lam and --lambdas: a price lies between 0 and 1e100, unlike {price}")


# ==================================================================================================
# MDP and perceptions
# ==================================================================================================
@dataclass(eq=False)
class TabularMdp:
    """P[s, a, s'] (S, A, S): probability that action a in s leads to s' and the game goes on; what a row lacks to 1 is
    the probability that it ends. R[s, a] (S, A): mean reward. gamma: discount. start (S,): distribution of the first
    state, if known. Raises ValueError if the arrays make no discounted MDP.
    """

    P: np.ndarray
    R: np.ndarray
    gamma: float
    start: np.ndarray | None = None

    def __post_init__(self):
        self.P, self.R = P, R = np.asarray(self.P, dtype=float), np.asarray(self.R, dtype=float)
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


def toy_text_perceptions(env: gym.Env) -> Perceptions:
    """From blind to identity, the finer the dearer. Raises ValueError on environments whose states it does not know."""
    if hasattr(env, "nrow"):  # FrozenLake
        return grid_perceptions(env.nrow, env.ncol)
    if hasattr(env, "shape"):  # CliffWalking
        return grid_perceptions(*env.shape)
    if env.observation_space.n == 500 and hasattr(env, "decode"):  # Taxi
        row, column, passenger, destination = np.unravel_index(np.arange(500), (5, 5, 5, 4))
        place, task = 5 * row + column, 4 * passenger + destination
        partitions = {"blind": 0 * row, "passenger": passenger, "task": task, "place": place}
        partitions |= {"place+dest.": 4 * place + destination, "place+pass.": 5 * place + passenger}
        return with_costs(partitions | {"identity": np.arange(500)})
    raise ValueError("perceptions are defined only for FrozenLake, CliffWalking and Taxi")


def per_state(perceptions: np.ndarray) -> np.ndarray:
    """The reading in which a' may depend on s' itself: whatever the leader pays for, the follower sees everything."""
    return np.broadcast_to(np.arange(perceptions.shape[1]), perceptions.shape)


# ==================================================================================================
# The operator
# ==================================================================================================
def make_operator(mdp: TabularMdp, perceptions, costs, lam: float, follower: Follower):
    """The map from f (S, A) to each perception's value (K, S, A), whose maximum over k is T_S f.

    Sums over the nonzero entries of P alone (Taxi: 3000 of 1.5 million), sorted so that each run of entries is one
    cell z of one perception, reached from one (s, a). Raises ValueError on what does not fit, as does the map itself.
    """
    num_states = len(mdp.R)
    cells, costs = np.asarray(perceptions), np.asarray(costs, dtype=float)
    if cells.ndim != 2 or not cells.size or cells.shape[1] != num_states or costs.shape != cells.shape:
        raise ValueError(f"perceptions and costs must be (K, {num_states}), not {cells.shape} and {costs.shape}")
    if not (np.issubdtype(cells.dtype, np.integer) and cells.min() >= 0):
        raise ValueError("perceptions must be cell indices: whole numbers, not negative")
    if not (np.isfinite(costs).all() and math.isfinite(lam)):
        raise ValueError("costs and lam must be finite")
    if follower not in ("cooperative", "adversarial"):
        raise ValueError(f"follower must be cooperative or adversarial, not {follower}")
    cells = cells.astype(np.int64)  # a small type would overflow below
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

    q (S, A); perceptions (K, S) cell indices; costs (K, S). Cooperative: max over a', adversarial: min. Raises
    ValueError on arrays that do not fit.
    """
    return make_operator(mdp, perceptions, costs, lam, follower)(np.asarray(q, dtype=float)).max(axis=0)


def solve(mdp: TabularMdp, perceptions, costs, lam: float, follower: Follower = "cooperative", tol=1e-8, q=None):
    """Iterate T_S from q (0 if not given). Returns f* (S, A), off by at most `tol`, and each sweep's residual (n,).

    Stops when the residual and the a-posteriori bound γ/(1−γ)·‖f_n − f_{n−1}‖ are at most `tol`; or after as many
    sweeps as Eq. (14) needs for that, when only rounding is left. Raises ValueError on what does not fit.
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


# ==================================================================================================
# One perception and one policy for the whole game
# ==================================================================================================
def best_policy(mdp: TabularMdp, reward: np.ndarray, allowed: np.ndarray, policy: np.ndarray):
    """Policy iteration over the actions `allowed` (S, A), from `policy` (S,): (policy, V (S,), Q (S, A)), exactly."""
    states = np.arange(len(policy))
    policy = np.where(allowed[states, policy], policy, allowed.argmax(axis=1))
    while True:
        value = np.linalg.solve(np.eye(len(policy)) - mdp.gamma * mdp.P[states, policy], reward[states, policy])
        q = reward + mdp.gamma * (mdp.P @ value)
        masked = np.where(allowed, q, -math.inf)
        better = masked.max(axis=1) > q[states, policy] + 1e-11 * max(1.0, float(np.abs(value).max()))
        if not better.any():
            return policy, value, q
        policy = np.where(better, masked.argmax(axis=1), policy)


def global_equilibrium(mdp: TabularMdp, perceptions, costs, lam: float, start, max_nodes: int = 0):
    """The best (θ, φ) for the whole game: (k, action of each cell of k, value at `start`), up to rounding.

    Value: E Σ_t γ^t [R(s_t, a_t) − λ·C_k(s_t)] over the live steps, for one k and one deterministic map from cells
    to actions: what the two reach as a team. `start`: a state, or a distribution (S,). NP-hard in general (Littman
    1994), hence best-first branch and bound: where a node has not fixed a cell's action each state may act as it
    likes, an MDP whose value bounds the node (with the identity, the answer at once). Raises ValueError on arrays that
    do not fit, and, with the bounds known by then, after `max_nodes` nodes (0: as many as take some seconds).
    """
    make_operator(mdp, perceptions, costs, lam, "cooperative")  # for its checks
    num_states, num_actions = mdp.R.shape
    if np.ndim(start) == 0 and start in range(num_states):
        start = np.eye(num_states)[start]
    start = np.asarray(start, dtype=float)
    if start.shape != (num_states,) or not ((start >= 0).all() and math.isclose(start.sum(), 1, abs_tol=1e-6)):
        raise ValueError(f"start must be a state, 0 to {num_states - 1}, or a distribution over them, not {start}")
    perceptions, states = np.asarray(perceptions), np.arange(num_states)
    rewards = mdp.R - lam * np.asarray(costs, dtype=float)[:, :, None]  # (K, S, A)
    max_nodes = max(len(perceptions), max_nodes or min(10_000, int(5e10 / num_states**3)))

    best, nodes = (-math.inf, 0, None), 0  # (value, k, action of each cell)
    queue = []  # (−bound, serial number, k, the actions (cells, A) left to each cell of k, policy of the node above)
    for k, cells in enumerate(perceptions):
        queue.append((-math.inf, k, k, np.ones((int(cells.max()) + 1, num_actions), dtype=bool), 0 * states))
    while queue and (best[2] is None or -queue[0][0] > best[0] + 1e-9 * max(1.0, abs(best[0]))):
        bound, _, k, left, policy = heapq.heappop(queue)
        if nodes == max_nodes:
            raise ValueError(f"not found within {nodes} nodes; its value lies in [{best[0]:.5g}, {-bound:.5g}]")
        nodes += 1
        policy, value, q = best_policy(mdp, rewards[k], left[perceptions[k]], policy)
        bound, slack = float(start @ value), 1e-9 * max(1.0, float(np.abs(value).max()))
        if bound <= best[0] + slack:
            continue
        # A candidate: in each cell the one action that loses least to first order, by discounted visits (S,)
        visits = np.linalg.solve(np.eye(num_states) - mdp.gamma * mdp.P[states, policy].T, start)
        loss = np.zeros(left.shape)  # (cells, A)
        np.add.at(loss, perceptions[k], (visits[:, None] + 1e-6) * (value[:, None] - q))  # other policies visit others
        actions = np.where(left, loss, math.inf).argmin(axis=1)  # (cells,)
        only = np.eye(num_actions, dtype=bool)
        attained = float(start @ best_policy(mdp, rewards[k], only[actions][perceptions[k]], policy)[1])
        if attained > best[0] + slack:
            best = (attained, k, actions)
        undecided = left.sum(axis=1) > 1
        if undecided.any():
            branch = np.where(undecided, loss.min(axis=1), -math.inf).argmax()  # where one action loses most
            for action in range(num_actions):
                child = left.copy()
                child[branch] = only[action]
                heapq.heappush(queue, (-bound, len(perceptions) + num_actions * nodes + action, k, child, policy))
    return best[1], best[2], best[0]


# ==================================================================================================
# Measurements
# ==================================================================================================
def contraction_factors(operator, shape: tuple, num_pairs: int, rng: np.random.Generator) -> dict[str, list[float]]:
    """‖T_S f − T_S g‖ / ‖f − g‖ over random pairs, and over pairs that differ by a constant, which are the worst."""
    factors = {"random": [], "shifted": []}
    for _ in range(num_pairs):
        f = rng.normal(size=shape)
        for kind, g in (("random", rng.normal(size=shape)), ("shifted", f + rng.normal())):
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


def readings(mdp: TabularMdp, perceptions: Perceptions, lam: float, tol: float, max_nodes: int = 0) -> dict:
    """What the start is worth by each reading of Eq. (13), and to one (θ, φ) for the whole game; what is bought."""
    names, cells, costs = perceptions
    live = (mdp.P.sum(-1) > 0) & reachable_states(mdp, mdp.start)[:, None]  # (S, A) after which there is more to see
    record = {"lambda": lam}
    for reading, partitions, follower in (
        ("T_S", cells, "cooperative"),
        ("per state", per_state(cells), "cooperative"),
        ("max-min", cells, "adversarial"),
    ):
        f, _ = solve(mdp, partitions, costs, lam, follower, tol)
        winners = cheapest_best(make_operator(mdp, partitions, costs, lam, follower)(f), costs)[live]
        shares = {name: float((winners == k).mean()) for k, name in enumerate(names)}
        record[reading] = {"value": float(mdp.start @ f.max(axis=1)), "shares": shares}  # the first action sees s
    try:
        k, actions, value = global_equilibrium(mdp, cells, costs, lam, mdp.start, max_nodes)
        record["whole game"] = {"value": value, "perception": names[k], "actions": actions.tolist()}
    except ValueError as refusal:
        record["whole game"] = {"refused": str(refusal)}
    return record


def counter_examples() -> dict[str, tuple[TabularMdp, Perceptions, float]]:
    """Games on which the readings part, by name: (MDP, perceptions, λ). Each starts in its first state."""

    def game(P, R, lam, **partitions):
        return TabularMdp(P, R, 0.9, np.eye(len(R))[0]), with_costs(partitions), lam

    # A fork leads left or right by chance. Left, the first action pays 1, right the second. A corridor leads back.
    P, R = np.zeros((4, 2, 4)), np.zeros((4, 2))
    P[0, :, 1:3], P[1:3, :, 3], P[3, :, 0], R[1, 0], R[2, 1] = 0.5, 1, 1, 1, 1
    circuit = game(P, R, 0.1, blind=[0, 0, 0, 0], identity=[0, 1, 2, 3])
    # The same, but after left or right the game is over.
    fork = game(P[:3, :, :3], R[:3], 0.1, blind=[0, 0, 0], identity=[0, 1, 2])
    # Two states in turn, each with a right action of its own: nothing is random, nothing is seen.
    clock = game([[[0, 1], [0, 1]], [[1, 0], [1, 0]]], np.eye(2), 0.0, blind=[0, 0])
    # Two rooms that look alike, each with a right action that pays 1 and leads to the other; the wrong one costs 1.
    rooms = game([[[0, 1], [1, 0]]] * 2, [[1, -1], [-1, 1]], 0.0, blind=[0, 0])
    return {"fork": fork, "circuit": circuit, "clock": clock, "rooms": rooms}


# ==================================================================================================
# Report
# ==================================================================================================
def table(title: str, header: list[str], rows: list[list]) -> str:
    texts = [header] + [[x if isinstance(x, str) else f"{x:.5g}" for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    lines = ["  " + "  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in texts]
    return "\n".join(["", title, *lines])


def report(results: dict) -> str:
    arguments, factors = results["arguments"], results["factors"]
    title = f"Contraction over {arguments['num_pairs']} pairs (f, g): factors, to be at most γ = {arguments['gamma']:g}"
    rows = [[kind, np.mean(numbers), max(numbers)] for kind, numbers in factors.items()]
    text = results["name"] + "\n" + table(title, ["pairs", "mean", "largest"], rows)
    text += f"\n  fixed points found from 3 starts differ by at most {results['starts_differ']:.1e}\n"

    records, rows = [(results["name"], record) for record in results["sweep"]], []
    for game, record in [*records, *results["counter_examples"].items()]:
        rows.append([game, f"{record['lambda']:g}"])
        for reading in ("T_S", "per state", "max-min"):
            most = max(shares := record[reading]["shares"], key=shares.get)
            rows[-1] += [record[reading]["value"], f"{most} {100 * shares[most]:.0f}%"]
        whole = record["whole game"]  # bounds where the search was given up
        rows[-1] += [whole.get("value", whole.get("refused", "").split(" in ")[-1]), whole.get("perception", "refused")]
    header = ["game", "λ", "T_S", "buys", "a' per state", "buys", "max-min", "buys", "one (θ, φ)", "θ"]
    return text + table("Value at the start, and what wins most (s, a), at price λ (last: small games)", header, rows)


def draw(path: Path, results: dict) -> None:
    figure = Figure(figsize=(16, 5), dpi=100, layout="constrained")
    errors, values, shares = figure.subplots(1, 3)
    gamma, lam, sweep = results["arguments"]["gamma"], results["arguments"]["lam"], results["sweep"]
    figure.suptitle(f"The Stackelberg–Bellman operator on {results['name']}, γ = {gamma:g}", fontsize=15)

    for start, curve in results["errors"].items():
        (line,) = errors.semilogy(curve, lw=2, label=start)
        errors.semilogy(curve[0] * gamma ** np.arange(len(curve)), "--", color=line.get_color(), lw=1)
    errors.set_ylim(bottom=1e-8)
    errors.set(title="A sweep contracts by γ (dashed) or more", xlabel=f"sweeps, λ = {lam:g}", ylabel="distance to f*")

    prices, worth = [f"{record['lambda']:g}" for record in sweep], []
    for reading, label, style in (
        ("T_S", "T_S, a' per cell", "o-C0"),
        ("per state", "T_S, a' per state", "^--C1"),
        ("whole game", "one (θ, φ) for the whole game", "s-C2"),
        ("max-min", f"max-min: {max(record['max-min']['value'] for record in sweep):.4g} or less", "v-C3"),
    ):
        worth.append([record[reading].get("value", math.nan) for record in sweep])
        values.plot(prices, worth[-1], style, label=label, lw=2)
    low, high = np.nanmin(worth[:3]), np.nanmax(worth[:3])
    span = high - low or 1.0
    values.set_ylim(max(min(worth[3]), low - span) - 0.1 * span, high + 0.1 * span)  # max-min may be far below
    values.set(title="What the start is worth", xlabel="price of perception λ", ylabel="value")

    names, base = [*sweep[0]["T_S"]["shares"]], np.zeros(len(sweep))
    for name, shade in zip(names, colormaps["cividis_r"](np.linspace(0.04, 0.96, len(names)))):  # dark: much is seen
        heights = np.array([record["T_S"]["shares"][name] for record in sweep])
        shares.bar(prices, heights, 0.85, bottom=base, color=shade, edgecolor="white", lw=0.5, label=name)
        base += heights
    shares.set(title="What the leader buys under T_S", xlabel="price of perception λ", ylabel="share of live (s, a)")
    for axis in (errors, values, shares):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=9, ncols=4 if axis is shares else 2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    figure.savefig(path)


# ==================================================================================================
# Main
# ==================================================================================================
def main(args: Args) -> dict:
    """Compute, save, print. Returns what results.json holds. Raises ValueError or OSError on what cannot be run."""
    kwargs = {"map_name": args.map_name} if args.map_name else {}
    kwargs |= {} if args.is_slippery else {"is_slippery": False}
    mdp = toy_text_mdp(args.env_id, args.gamma, **kwargs)
    perceptions = toy_text_perceptions(make_env(args.env_id, **kwargs))
    stamp = f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # microseconds: runs may start together
    run_dir = Path(args.run_dir or f"runs/{args.env_id.replace('/', '_')}__sprig_tabular__{args.seed}__{stamp}")
    run_dir.mkdir(parents=True, exist_ok=True)
    if any(run_dir.iterdir()):
        raise ValueError(f"--run-dir {run_dir} is not empty; nothing was changed")
    tempfile.TemporaryFile(dir=run_dir).close()  # may it be written?

    game, rng = (mdp, perceptions.cells, perceptions.costs, args.lam, args.follower), np.random.default_rng(args.seed)
    operator, (fixed_point, _) = make_operator(*game), solve(*game, args.tol)
    scale = 1 + float(np.abs(fixed_point).max())
    noise = rng.normal(scale=2 * scale, size=mdp.R.shape)
    starts = {"from 0": 0 * noise, "from far above": 0 * noise + 5 * scale, "from noise": noise}
    prices = sorted({args.lam, *args.lambdas})
    floor = 10 * args.tol + 1e-13 * scale
    results = {
        "arguments": asdict(args),
        "name": args.env_id + f" {args.map_name}".rstrip() + ("" if args.is_slippery else ", not slippery"),
        "starts_differ": max(float(np.abs(solve(*game, args.tol, q)[0] - fixed_point).max()) for q in starts.values()),
        "errors": {start: error_curve(operator, q, fixed_point, floor) for start, q in starts.items()},
        "factors": contraction_factors(operator, mdp.R.shape, args.num_pairs, rng),
        "sweep": [readings(mdp, perceptions, lam, args.tol, args.max_nodes) for lam in prices],
        "counter_examples": {name: readings(*game, tol=1e-12) for name, game in counter_examples().items()},
    }
    try:
        (run_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(run_dir / "tabular.png", results)
    finally:  # even if the disk is full
        with contextlib.suppress(OSError, ValueError):  # stdout is closed, full or knows no Greek
            print(f"{report(results)}\n\nplot and numbers: {run_dir}", flush=True)
    return results


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # for an ASCII terminal, λ and the boxes of --help become "?"
    try:
        main(tyro.cli(functools.partial(Args), description=__doc__.splitlines()[0]))  # a class would box its errors
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
