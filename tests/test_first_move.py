"""Two games small enough to solve: closed forms, brute force, and what the order of moves can change."""

from itertools import product

import first_move as study
import numpy as np
import pandas as pd
import pytest
import torch

START = torch.tensor([[-0.7], [1.3]], dtype=torch.float64)  # x, y


@pytest.mark.parametrize("name", study.METHODS)
def test_each_method_ends_where_the_closed_form_of_the_quadratic_says(name):
    """At y = kx and x = (ap + ρckq) / (a + ρck²), with a = c = h = p = 1, k = 2, q = 0."""
    method = study.METHODS[name]
    rho = {"first-order": 0, "unrolled": 1 - 0.9**method.unrolled, "implicit": 1 / (1 + 1e-3)}[method.gradient]
    x, y = study.play(study.quadratic(0.1), method, *START, 400)[-1]
    assert x.item() == pytest.approx(1 / (1 + 4 * rho), abs=1e-6)
    assert y.item() == pytest.approx(2 * x.item(), abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_the_stackelberg_point_is_that_of_brute_force(beta):
    """Written anew, in numpy: all encoders with 7 probabilities per state, then all in ever finer grids about the best;
    the follower answers each exactly."""
    centre, spread = np.zeros(6), 6.0
    for _ in range(12):
        logits = centre + np.array(list(product(np.linspace(-spread, spread, 7), repeat=6)))  # (7^6, S)
        encoder = np.stack([1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(logits))], 1)  # (7^6, Z, S)
        mass = encoder.mean(-1)  # p(z)
        expected = encoder @ study.REWARD.numpy() / 6 / mass[..., None]  # E[R | z, a]
        weights = np.exp((expected - expected.max(-1, keepdims=True)) / (beta or 1e-9))
        paid = (mass * (weights * expected).sum(-1) / weights.sum(-1)).sum(-1)
        paid -= study.PRICE * (encoder * np.log(encoder / mass[..., None])).sum((1, 2)) / 6
        centre, spread = logits[paid.argmax()], spread / 1.5
    game, theta = study.bottleneck(beta), study.solve(beta, anticipate=True)
    assert game.leader(theta, game.best_response(theta)).item() == pytest.approx(paid.max(), abs=2e-5)


@pytest.mark.parametrize("game", [study.quadratic, lambda rate: study.bottleneck(0.2, 100 * rate)], ids=["2", "6"])
def test_at_small_steps_it_does_not_matter_who_moves_first(game):
    """The paths over one time part by something proportional to the step size."""
    start = START if game is study.quadratic else study.starts(1)
    gaps = [study.order_gap(game(0.1 / n), *start, 50 * n) for n in (4, 8, 16)]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1) == gaps[1] / gaps[2]


def gradients(game, theta, phi):
    """The leader's: first-order, and implicit."""
    losses = [lambda theta, phi, player=player: -player(theta[0], phi[0]).sum() for player in game[:2]]
    options = {"step_size": 0, "num_steps": 0, "damping": 1e-9, "cg_iterations": 50, "cg_tolerance": 1e-9}
    for method in ("first-order", "implicit"):
        yield study.leader_gradient(*losses, [theta], [phi], method, **options, clamp=None)[0]


@pytest.mark.parametrize(("bonus", "least", "most"), [(0.2, 0, 1e-6), (0.0, 0.1, 10)])
def test_only_what_the_follower_alone_is_paid_for_makes_leading_matter(bonus, least, most):
    """Envelope: with the follower's entropy bonus in u_L as well, an answered leader has nothing to anticipate."""
    game, theta = study.bottleneck(0.2, leader_bonus=bonus), study.starts(1)[0][0]
    partial, total = gradients(game, theta, game.best_response(theta))
    assert least <= (total - partial).norm() / partial.norm() <= most


@pytest.mark.parametrize("anticipate", [False, True])
def test_the_points_are_stationary_each_for_its_own_gradient(anticipate):
    game, theta = study.bottleneck(0.2), study.solve(0.2, anticipate)
    slopes = [slope.norm().item() for slope in gradients(game, theta, game.best_response(theta))]
    assert slopes[anticipate] < 1e-5 < 1e-3 < slopes[not anticipate]


def test_a_whole_study(tmp_path):
    study.main(study.Args(starts=2, steps=1, output=tmp_path))
    assert len(pd.read_csv(tmp_path / "first_move.csv")) == 5 * (1 + 2 * 8) and (tmp_path / "first_move.png").exists()
