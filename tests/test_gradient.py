"""The leader's total derivative: closed forms, limits, finite differences, and the losses that it is for."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.func import functional_call

import sprig_continuous as sprig  # whose update is the same text as that of sprig_atari

METHODS = ["unrolled", "implicit"]
EXACT = {"damping": 0.0, "cg_iterations": 200, "cg_tolerance": 1e-14}


def gradient(game, method, **options):
    """`leader_gradient` with nothing clamped but what a test asks for. game: (f_L, f_F, theta, phi)."""
    defaults = {"step_size": 0.1, "num_steps": 1, "clamp": None, **EXACT}
    return sprig.leader_gradient(*game, method, **defaults | options)


def doubles(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def distance(ours, theirs):
    """Between two gradients, relative to the second."""
    return ((flat(ours) - flat(theirs)).norm() / flat(theirs).norm()).item()


# ==== Quadratic games =============================================================================
def scalar_game(a=1.0, c=1.0, h=1.0, p=1.0, k=2.0, q=0.0, x=0.5, y=0.3):
    """The leader's x wants p and the follower's y at q; the follower wants y = k·x."""

    def leader_loss_fn(theta, phi):
        return 0.5 * a * (theta[0] - p) ** 2 + 0.5 * c * (phi[0] - q) ** 2

    def follower_loss_fn(theta, phi):
        return 0.5 * h * (phi[0] - k * theta[0]) ** 2

    return leader_loss_fn, follower_loss_fn, doubles(x), doubles(y)


def test_the_gradients_of_the_scalar_game():
    for method, damping, expected in (
        ("first-order", 0, -0.5), ("implicit", 0, 0.1), ("implicit", 1, -0.2), ("unrolled", 0, -0.426)
    ):  # fmt: skip
        got = gradient(scalar_game(), method, damping=damping, step_size=0.1)[0].item()
        assert got == pytest.approx(expected, abs=1e-12)
    for method, x, loss in (("first-order", 1.0, 2.0), ("implicit", 0.2, 0.4)):  # Nash's point and Stackelberg's
        game = scalar_game(x=x, y=2 * x)
        assert abs(gradient(game, method)[0].item()) < 1e-12 and game[0](*game[2:]).item() == pytest.approx(loss)


@pytest.mark.parametrize("seed", range(3))
def test_scalar_games_follow_the_closed_form(seed):
    """d/dx f_L(x, y(x)) = a(x - p) + y'(x)·c(y - q), where y' = ρk and y is y, or y⁺ when unrolled."""
    rng = np.random.default_rng(seed)
    a, c, h = rng.uniform(0.2, 5, 3)
    p, k, q, x, y = rng.normal(size=5)
    damping, step_size = rng.uniform(0.1, 10), rng.uniform(0.01, 0.3)
    game = scalar_game(a, c, h, p, k, q, x, y)
    for lam in (0.0, damping):
        expected = a * (x - p) + h / (h + lam) * k * c * (y - q)
        assert gradient(game, "implicit", damping=lam)[0].item() == pytest.approx(expected, rel=1e-9)
    for num_steps in (1, 2, 7):
        rho = 1 - (1 - step_size * h) ** num_steps
        expected = a * (x - p) + rho * k * c * (y - rho * (y - k * x) - q)
        got = gradient(game, "unrolled", step_size=step_size, num_steps=num_steps)
        assert got[0].item() == pytest.approx(expected, rel=1e-9)


# ==== The losses of SPRIG =========================================================================
class Heads(torch.nn.Module):
    """A follower small enough for dense linear algebra."""

    def __init__(self, num_features):
        super().__init__()
        self.actor, self.critic = torch.nn.Linear(num_features, 3), torch.nn.Linear(num_features, 1)

    def forward(self, features):
        return self.actor(features), self.critic(features).squeeze(-1)


def real_game(**settings):
    """The losses on a real leader of three entries, in float64: (f_L, f_F, theta, phi), what they are made of.
    Nothing is shared between the two losses; the rollout's policy is a little away from the current one."""
    torch.manual_seed(1)
    shown = {"leader_value_coef": 0.3, "perception_cost_weight": 0.5, "ent_coef": 0.1, "cost_rows": 0}
    args = sprig.Args(**shown | settings, max_grad_norm=1e9, norm_obs=False, feature_scale=1.0)
    leader = sprig.Leader(gym.spaces.Box(-1, 1, (3,), np.float32), args)
    for gate in (*leader.layer_gates, *(block.gate for block in leader.blocks)):
        gate.data.fill_(0.7)  # at their first value, 0, attention would not matter
    leader, follower = leader.double(), Heads(leader.num_features).double()
    obs, actions = torch.randn(16, 3).double(), torch.randint(3, (16,))
    logits, values = follower(leader(obs))
    logprobs = sprig.action_distribution(logits).log_prob(actions).detach() + 0.05 * torch.randn(16)
    batch = sprig.Batch(obs, actions, logprobs, values.detach() + torch.randn(16), *torch.randn(2, 16).double())

    def call(module, values, *inputs):
        return functional_call(module, dict(zip(dict(module.named_parameters()), values)), inputs)

    def leader_loss_fn(theta, phi):
        features, attention = call(leader, theta, obs, 0)
        cost = sprig.perception_cost(attention, "entropy")
        return sprig.leader_loss(*call(follower, phi, features), cost, batch, args)[0]

    def follower_loss_fn(theta, phi):
        return sprig.follower_loss(*call(follower, phi, call(leader, theta, obs)), batch, args)[0]

    game = leader_loss_fn, follower_loss_fn, list(leader.parameters()), list(follower.parameters())
    return game, (leader, follower, batch, args)


def test_unrolled_gradient_equals_finite_differences():
    game = leader_loss_fn, follower_loss_fn, theta, phi = real_game()[0]

    def after_three_steps(sign, direction):
        answer, moved = phi, [(x + sign * 1e-6 * d).detach() for x, d in zip(theta, direction)]
        for _ in range(3):
            slope = torch.autograd.grad(follower_loss_fn(moved, answer), answer)
            answer = [(x - 0.05 * dx).detach().requires_grad_() for x, dx in zip(answer, slope)]
        return leader_loss_fn(moved, answer).item()

    got = flat(gradient(game, "unrolled", step_size=0.05, num_steps=3))
    for _ in range(5):
        direction = [torch.randn_like(x) for x in theta]
        slope = (after_three_steps(1, direction) - after_three_steps(-1, direction)) / 2e-6
        assert (got @ flat(direction)).item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_implicit_gradient_equals_dense_linear_algebra():
    game = leader_loss_fn, follower_loss_fn, theta, phi = real_game()[0]
    v = flat(torch.autograd.grad(leader_loss_fn(theta, phi), phi))
    slope = flat(torch.autograd.grad(follower_loss_fn(theta, phi), phi, create_graph=True))
    rows = [torch.autograd.grad(x, phi + theta, retain_graph=True, materialize_grads=True) for x in slope]
    H, M = (torch.stack([flat(row[part]) for row in rows]) for part in (slice(0, len(phi)), slice(len(phi), None)))
    lowest = torch.linalg.eigvalsh(H).min().item()
    assert lowest < 0, "PPO's loss has directions of negative curvature"
    correction = M.T @ torch.linalg.solve(H + (0.1 - lowest) * torch.eye(len(H), dtype=H.dtype), v)
    first_order = flat(torch.autograd.grad(leader_loss_fn(theta, phi), theta))
    assert distance(gradient(game, "implicit", damping=0.1 - lowest), [first_order - correction]) < 1e-9
    assert correction.norm() > 0.01 * first_order.norm()


# ==== Limits ======================================================================================
def test_strong_damping_gives_the_first_order_gradient():
    game, _ = real_game()
    first_order = gradient(game, "first-order")
    errors = [distance(gradient(game, "implicit", damping=damping), first_order) for damping in (1e3, 1e4, 1e5)]
    assert errors[2] < 1e-4
    for a, b in zip(errors, errors[1:]):
        assert a / b == pytest.approx(10, rel=0.02), "the correction falls like 1/λ"


def test_damping_of_one_over_eta_is_one_step_of_size_eta():
    """To first order in η: of what both add to the first-order gradient, the difference is of second order."""
    game, gaps, corrections = scalar_game(), [], []
    for step_size in (1e-2, 5e-3, 2.5e-3):
        unrolled = gradient(game, "unrolled", step_size=step_size)[0].item() + 0.5
        implicit = gradient(game, "implicit", damping=1 / step_size)[0].item() + 0.5
        gaps.append(unrolled - implicit)
        corrections.append(implicit)
    for (a, b), (c, d) in zip(zip(corrections, corrections[1:]), zip(gaps, gaps[1:])):
        assert a / b == pytest.approx(2, rel=0.02) and c / d == pytest.approx(4, rel=0.02)


# ==== Safeguards ==================================================================================
def test_conjugate_gradients_stop_on_negative_curvature():
    game = scalar_game(h=-2.0)
    assert gradient(game, "implicit")[0].item() == -0.5, "no correction along a direction that has no minimum"
    assert gradient(game, "implicit", damping=5.0)[0].item() == pytest.approx(-0.5 - 2 / (-2 + 5) * 2 * 0.3)
    matrix = torch.diag(torch.tensor([4.0, 1.0, -0.5], dtype=torch.float64))
    v = torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64)
    x = sprig.conjugate_gradients(lambda p: matrix @ p, v, 100, 1e-12)
    one_step = v * (v @ v) / (v @ matrix @ v)
    assert x.norm() >= one_step.norm() > 0 and x.isfinite().all(), "what they had before stays"


def test_conjugate_gradients_stop_at_their_tolerance():
    matrix, v, products = torch.logspace(0, 2, 30).double().diag(), torch.ones(30).double(), []

    def residual(iterations, tolerance, v=v):
        products.clear()
        x = sprig.conjugate_gradients(lambda p: products.append(p) or matrix @ p, v, iterations, tolerance)
        return ((v - matrix @ x).norm() / v.norm()).item()

    assert 1e-6 < residual(1000, 1e-3) <= 1e-3 and 3 < len(products) < 60
    assert residual(3, 1e-3) > 1e-3 and len(products) == 3
    assert not sprig.conjugate_gradients(lambda p: matrix @ p, torch.zeros_like(v), 10, 1e-3).any()


@pytest.mark.parametrize("method", METHODS)
def test_clamp_bounds_the_correction_and_keeps_its_direction(method):
    game, options = real_game()[0], {"step_size": 0.5, "damping": 1.0}
    first_order, free = (flat(gradient(game, m, **options)) for m in ("first-order", method))
    ratio = ((free - first_order).norm() / first_order.norm()).item()
    assert ratio > 0.01
    for clamp in (0.0, 0.3 * ratio, 3 * ratio):
        expected = first_order + min(1, clamp / ratio) * (free - first_order)
        torch.testing.assert_close(flat(gradient(game, method, **options, clamp=clamp)), expected)


@pytest.mark.parametrize("method", ["first-order", *METHODS])
def test_nothing_is_changed_and_what_is_unused_gets_zero(method):
    theta = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2)), torch.nn.Parameter(torch.ones(4))]
    phi = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(1))]
    theta[0].grad = torch.full((3,), 7.0)
    before = [x.detach().clone() for x in theta + phi]

    def leader_loss_fn(theta, phi):  # knows neither the critic phi[1] nor theta[2]
        return (theta[0] * phi[0]).sum() ** 2 + (theta[1] ** 2).sum()

    def follower_loss_fn(theta, phi):  # does not know theta[1]
        return ((phi[0] - theta[0]) ** 2).sum() + (phi[1] ** 2).sum()

    got = gradient((leader_loss_fn, follower_loss_fn, theta, phi), method, damping=0.5, num_steps=2)
    assert isinstance(got, list) and [x.shape for x in got] == [x.shape for x in theta]
    assert not any(x.requires_grad for x in got) and got[0].any() and not got[2].any()
    torch.testing.assert_close(got[1], 2 * theta[1].detach())
    assert all(torch.equal(a, b) for a, b in zip(before, theta + phi))
    assert theta[0].grad.tolist() == [7, 7, 7] and all(x.grad is None for x in theta[1:] + phi)


@pytest.mark.parametrize("method", METHODS)
def test_players_that_do_not_meet_have_no_correction(method):
    for follower_loss_fn in (lambda theta, phi: phi[0] ** 2, lambda theta, phi: 2 * phi[0]):
        game = (lambda theta, phi: theta[0] ** 2, follower_loss_fn, doubles(0.5), doubles(0.3))
        assert gradient(game, method, clamp=1.0) == [1.0]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown leader gradient 'third-order'"):
        gradient(scalar_game(), "third-order")
    with pytest.raises(ValueError, match="--leader-gradient implicit needs --update stackelberg"):
        sprig.Args(leader_gradient="implicit", update="joint")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_takes_the_total_derivative(method, monkeypatch):
    options = {"step_size": 0.05, "num_steps": 1, "damping": 20.0, "cg_iterations": 300, "cg_tolerance": 1e-12}
    options["clamp"] = None
    monkeypatch.setattr(sprig, "leader_gradient", functools.partial(sprig.leader_gradient, **options))
    game, (leader, follower, batch, args) = real_game(leader_gradient=method)
    expected, first_order = gradient(game, method, **options), gradient(game, "first-order")
    assert distance(first_order, expected) > 0.001
    before = [p.detach().clone() for p in leader.parameters()]
    sprig.stackelberg_step(leader, follower, torch.optim.SGD(leader.parameters(), lr=1.0), batch, args)
    assert distance([a - b for a, b in zip(before, leader.parameters())], expected) < 1e-9
