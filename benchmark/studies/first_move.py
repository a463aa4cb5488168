"""What moving first is worth, in two games that are small enough to solve.

    python benchmark/studies/first_move.py  # a table; results/first_move.png and .csv

1. The quadratic game: the leader loses ½(x - 1)² + ½y², the follower ½(y - 2x)². Simultaneous play (Nash) ends at
   (1, 2), where the leader loses 2; leading is worth 1.6, at (0.2, 0.4).
2. The bottleneck game, SPRIG in miniature. One of 6 states is drawn; the leader, a softmax encoder, shows the follower
   one of 2 symbols; the follower, a softmax policy, takes one of 3 actions. As in Eq. (7), (8) and line 17, up to a
   scale: u_L = E[R] - λ·I(state; symbol), u_F = E[R] + β·H(action | symbol). The follower's best response is
   softmax(E[R | symbol, action] / β): the Stackelberg point is the maximum of a function of the encoder alone.

All methods play from the same starts with the same step sizes, as many steps of the leader. The gradients are
`leader_gradient` of sprig_atari.py, unclamped, with a damping of 0.001. A gradient evaluation is a pass backward
through a loss, a Hessian-vector product, or one unrolled step's share of the last pass. The utility of an end is the
leader's once the follower has fully answered: so no method looks worse for a follower that is slow.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.special import entr

from sprig_atari import leader_gradient

BETAS = (0.0, 0.01, 0.1, 0.2)  # 0.01 is Table 1's
EXACT = {"damping": 1e-3, "cg_iterations": 20, "cg_tolerance": 1e-3, "clamp": None}


@dataclass
class Args:
    starts: int = 16  # of either game, the same for each method
    steps: int = 150  # of the leader
    output: Path = Path("results")  # folder of first_move.png and first_move.csv

    def __post_init__(self):
        if self.starts < 1 or self.steps < 1:
            raise ValueError("--starts and --steps must be at least 1")


class Game(NamedTuple):
    leader: Callable  # its utility at (theta, phi), (N,) for N starts
    follower: Callable
    best_response: Callable  # φ*(θ)
    distance: Callable  # of leaders theta (N, ...) from another: (N,)
    step_size: float  # of both


class Method(NamedTuple):
    first: str  # who moves first: "nobody", "leader" or "follower"
    gradient: str = "first-order"
    unrolled: int = 0  # steps
    answers: int = 1  # steps of the follower per step of the leader


METHODS = {
    "simultaneous": Method("nobody"),
    "leader first (Algorithm 1)": Method("leader"),
    "follower first": Method("follower"),
    "slow leader: 10 answers": Method("leader", answers=10),
    "unrolled, 1 step": Method("leader", "unrolled", 1),
    "unrolled, 10 steps": Method("leader", "unrolled", 10),
    "implicit": Method("leader", "implicit"),
    "implicit, 10 answers": Method("leader", "implicit", answers=10),
}


def play(game: Game, method: Method, theta: Tensor, phi: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """The path [(theta, phi)], steps + 1 long, from starts theta (N, ...), phi (N, ...). Each player ascends its own
    utility. Starts do not mix, but for the implicit gradient, where conjugate gradients solve for all at once."""
    losses = [lambda theta, phi, player=player: -player(theta[0], phi[0]).sum() for player in game[:2]]
    options = EXACT | {"step_size": game.step_size, "num_steps": method.unrolled}

    def answer(theta, phi):
        for _ in range(method.answers):
            phi = phi.detach().requires_grad_()
            phi = phi - game.step_size * torch.autograd.grad(losses[1]([theta], [phi]), phi)[0]
        return phi.detach()

    path = [(theta, phi)]
    for _ in range(steps):
        phi = answer(theta, phi) if method.first == "follower" else phi
        (slope,) = leader_gradient(*losses, [theta], [phi], method.gradient, **options)
        moved = theta - game.step_size * slope.detach()
        seen = moved if method.first == "leader" else theta
        theta, phi = moved, phi if method.first == "follower" else answer(seen, phi)
        path.append((theta, phi))
    return path


def order_gap(game: Game, theta: Tensor, phi: Tensor, steps: int) -> float:
    """The largest distance of theta and phi between the paths of leader-first and simultaneous play."""
    paths = (play(game, Method(first), theta, phi, steps) for first in ("nobody", "leader"))
    return max(torch.cat([(x - y).flatten() for x, y in zip(a, b)]).norm().item() for a, b in zip(*paths))


# ==== The quadratic game ==========================================================================
POINTS = {"Nash": torch.tensor(1.0), "Stackelberg": torch.tensor(0.2)}  # x; y = 2x


def quadratic(step_size: float = 0.1) -> Game:
    return Game(
        leader=lambda x, y: -0.5 * (x - 1) ** 2 - 0.5 * y**2,
        follower=lambda x, y: -0.5 * (y - 2 * x) ** 2,
        best_response=lambda x: 2 * x,
        distance=lambda x, other: (x - other).abs(),
        step_size=step_size,
    )


# ==== The bottleneck game =========================================================================
REWARD = torch.tensor(  # (S = 6, A = 3), drawn once
    [[0.5, 1.0, 0.1], [0.9, 0.3, 0.4], [0.8, 0.4, 0.5], [0.0, 0.8, 0.5], [0.3, 0.8, 0.3], [0.5, 0.1, 0.4]],
    dtype=torch.float64,
)
PRICE = 0.2  # λ, of a nat


def bottleneck(beta: float, step_size: float = 10.0, leader_bonus: float = 0.0) -> Game:
    """theta (N, S, Z) and phi (N, Z, A) are logits. leader_bonus: weight of the same entropy in u_L."""

    def pay(theta, phi, price, bonus):
        encoder, policy = theta.softmax(-1), phi.softmax(-1)  # p(z|s), π(a|z)
        marginal = encoder.mean(-2)  # p(z)
        paid = (encoder.transpose(-1, -2) @ REWARD * policy).sum((-1, -2)) / len(REWARD)  # E[R]
        if price:
            paid = paid - price * (entr(marginal).sum(-1) - entr(encoder).sum(-1).mean(-1))
        return paid + bonus * (marginal * entr(policy).sum(-1)).sum(-1) if bonus else paid

    def best_response(theta):
        symbols = theta.softmax(-1).transpose(-1, -2)
        return symbols @ REWARD / symbols.sum(-1, keepdim=True) / max(beta, 1e-6)  # E[R | z, a] / β

    def distance(theta, other):  # total variation, mean over states, whichever name the symbols have
        apart = [(theta.softmax(-1) - x.softmax(-1)).abs().sum(-1).mean(-1) / 2 for x in (other, other.flip(-1))]
        return torch.minimum(*apart)

    leader, follower = partial(pay, price=PRICE, bonus=leader_bonus), partial(pay, price=0, bonus=beta)
    return Game(leader, follower, best_response, distance, step_size)


def starts(count: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    return tuple(torch.from_numpy(rng.normal(size=(count, *shape))) for shape in ((6, 2), (2, 3)))


def solve(beta: float, anticipate: bool) -> Tensor:
    """The leader's theta (6, 2) at the Stackelberg point, or without `anticipate` at the Nash point that is best for
    it, where it takes the follower's exact best response as given: the best of 24 ascents."""
    game, theta = bottleneck(beta), starts(24)[0].requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.1)
    for _ in range(400):
        phi = game.best_response(theta)
        optimizer.zero_grad()
        (-game.leader(theta, phi if anticipate else phi.detach()).sum()).backward()
        optimizer.step()
    return theta.detach()[game.leader(theta, game.best_response(theta)).argmax()]


# ==== Every method on both ========================================================================
def measure(label: str, game: Game, nash: Tensor, stackelberg: Tensor, theta: Tensor, phi: Tensor, steps: int):
    """The table of one game: a row for the Nash point, and for each method and start."""
    ends, costs = {"Nash": nash[None]}, {}
    for name, method in METHODS.items():
        groups = [(theta, phi)] if method.gradient != "implicit" else zip(theta.split(1), phi.split(1))
        ends[name] = torch.cat([play(game, method, *group, steps)[-1][0] for group in groups])
        with mock.patch.object(torch.autograd, "grad", wraps=torch.autograd.grad) as passes:
            play(game, method, theta[:1], phi[:1], 20)
        costs[name] = passes.call_count / 20 + method.unrolled
    frames, best = [], game.leader(stackelberg, game.best_response(stackelberg))
    for name, end in ends.items():
        utility = game.leader(end, game.best_response(end))
        columns = {"game": label, "method": name, "start": range(len(end)), "leader_utility": utility}
        columns |= {"below_stackelberg": best - utility, "from_nash": game.distance(end, nash)}
        frames.append(pd.DataFrame(columns | {"from_stackelberg": game.distance(end, stackelberg)}))
    return pd.concat(frames).assign(evaluations_per_step=lambda table: table.method.map(costs))


def draw(table: pd.DataFrame, path: Path) -> None:
    figure = Figure((11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    xs, ys = np.meshgrid(np.linspace(-1, 1.4), np.linspace(-0.9, 2.4))
    left.contour(xs, ys, -quadratic().leader(xs, ys), levels=[0.1, 0.4, 1, 2, 3], colors="#cccccc", linewidths=0.8)
    left.axline((0, 0), slope=2, ls="--", color="#777777", lw=1)
    for name, x in POINTS.items():
        left.text(x + 0.08, 2 * x - 0.1, name)
    left.set(title="Quadratic game", xlabel="leader (grey: equal losses)", ylabel="follower (dashed: best response)")
    colours = "#000000 #0072b2 #56b4e9 #009e73 #e69f00 #d55e00 #cc79a7 #7b3294".split()
    for k, ((name, method), colour) in enumerate(zip(METHODS.items(), colours)):
        points = np.array(play(quadratic(), method, torch.tensor([-0.5]), torch.tensor([1.8]), 300))[..., 0]
        line = ":" if name == "follower first" else "-"  # which here takes the same path as simultaneous play
        left.plot(*points.T, line, marker="o", markevery=[-1], ms=5, color=colour)
        rows = table[table.method == name]
        right.plot([], "o-", color=colour, label=f"{name} ({rows.evaluations_per_step.max():.0f})")
        for at, beta in enumerate(BETAS):
            below = rows.below_stackelberg[rows.game == f"β = {beta:g}"]
            x, missed = at - 0.35 + 0.1 * k, below > 0.03
            right.plot(np.full(len(below), x), below.where(~missed), "o", color=colour, ms=4, alpha=0.6)
            right.text(x, 0.03, missed.sum() or "", color=colour, ha="center", size=9, weight="bold")
    nash = table[(table.method == "Nash") & (table.game != "quadratic")].below_stackelberg
    right.hlines(nash, np.arange(len(nash)) - 0.45, np.arange(len(nash)) + 0.45, color="#999999", lw=1, zorder=0)
    right.text(-0.4, 0.0285, "so many starts end at a worse optimum, 0.11 below", fontsize=8)
    right.set_xticks(range(len(BETAS)), [f"{beta:g}" for beta in BETAS])
    right.set(ylim=(-0.001, 0.032), xlabel="β, the follower's entropy bonus (Table 1: 0.01)")
    right.set(ylabel="leader's utility below Stackelberg's", title="Bottleneck game (a dot per start; grey: Nash)")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, title="in brackets: gradient evaluations per step")
    figure.savefig(path, dpi=100)


def main(args: Args) -> None:
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output {args.output} cannot be written: {error.strerror}") from None
    torch.set_num_threads(1)
    theta, phi = starts(args.starts)
    frames = [measure("quadratic", quadratic(), *POINTS.values(), theta[:, 0, 0], phi[:, 0, 0], args.steps)]
    for beta in BETAS:
        points = (solve(beta, anticipate) for anticipate in (False, True))
        frames.append(measure(f"β = {beta:g}", bottleneck(beta), *points, theta, phi, args.steps))
    table = pd.concat(frames)
    table.round(6).to_csv(args.output / "first_move.csv", index=False)
    draw(table, args.output / "first_move.png")
    for column in ("below_stackelberg", "from_stackelberg", "evaluations_per_step"):
        print(f"\n{column}, median over {args.starts} starts")
        print(table.pivot_table(column, "method", "game", "median", sort=False).round(4).to_string())
    gaps = [order_gap(bottleneck(0.2, 10 / 2**k), *starts(1), 100 * 2**k) for k in range(4)]
    print("\nleader first against simultaneous, β = 0.2, at steps halved each time: apart by", np.round(gaps, 4))


if __name__ == "__main__":
    main(tyro.cli(Args, description="\n\n".join(__doc__.split("\n\n")[:2])))
