"""The leader's total derivative: closed forms, limits, finite differences, and the games that it is for."""

import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, build, plain_attention, random_batch
from test_game import central_differences, tiny_game
from test_runs import scalars

import sprig_atari as sprig

EXACT = {"damping": 0.0, "cg_iterations": 200, "cg_tolerance": 1e-14}
METHODS = ["unrolled", "implicit"]


def doubles(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def distance(ours, theirs):
    """Between two gradients, relative to the second."""
    ours, theirs = (torch.cat([x.flatten() for x in gradients]) for gradients in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


# -- The scalar game -------------------------------------------------------------------------------
def scalar_game(a=1.0, c=1.0, h=1.0, p=1.0, k=2.0, q=0.0):
    """The leader's x wants p and the follower's y at q; the follower wants y = k·x."""

    def leader_loss_fn(theta, phi):
        return 0.5 * a * (theta[0] - p) ** 2 + 0.5 * c * (phi[0] - q) ** 2

    def follower_loss_fn(theta, phi):
        return 0.5 * h * (phi[0] - k * theta[0]) ** 2

    return leader_loss_fn, follower_loss_fn


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("first-order", {}, -0.5),
        ("implicit", EXACT, 0.1),
        ("implicit", {**EXACT, "damping": 1.0}, -0.2),
        ("unrolled", {"step_size": 0.1, "num_steps": 1}, -0.426),
    ],
)
def test_the_gradients_of_the_scalar_game(method, options, expected):
    ((got,),) = (sprig.leader_gradient(*scalar_game(), *([x] for x in doubles(0.5, 0.3)), method, **options),)
    assert got.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_scalar_games_follow_the_closed_form(seed):
    """d/dx f_L(x, y(x)) = a(x - p) + y'(x)·c(y - q), where y' = ρk and y is y, or y⁺ when unrolled."""
    rng = np.random.default_rng(seed)
    a, c, h = rng.uniform(0.2, 5, 3)
    p, k, q, x, y = rng.normal(size=5)
    damping, step_size = rng.uniform(0.1, 10), rng.uniform(0.01, 0.3)
    game = scalar_game(a, c, h, p, k, q)

    def gradient(method, **options):
        return sprig.leader_gradient(*game, *([z] for z in doubles(x, y)), method, **options)[0].item()

    assert gradient("first-order") == pytest.approx(a * (x - p), rel=1e-12)
    for lam in (0.0, damping):
        expected = a * (x - p) + h / (h + lam) * k * c * (y - q)
        assert gradient("implicit", **{**EXACT, "damping": lam}) == pytest.approx(expected, rel=1e-9)
    for num_steps in (1, 2, 7):
        rho = 1 - (1 - step_size * h) ** num_steps
        answer = y - rho * (y - k * x)
        expected = a * (x - p) + rho * k * c * (answer - q)
        assert gradient("unrolled", step_size=step_size, num_steps=num_steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("method", "options", "rho"),
    [
        ("first-order", {}, 0.0),  # Nash
        ("implicit", {"damping": 1.5}, 2 / (2 + 1.5)),
        ("unrolled", {"step_size": 0.1, "num_steps": 1}, 0.2),
        ("unrolled", {"step_size": 0.1, "num_steps": 4}, 1 - 0.8**4),
        ("implicit", {"damping": 0.0}, 1.0),  # Stackelberg
    ],
)
def test_descent_lands_on_the_stationary_point_of_its_own_method(method, options, rho):
    a, c, h, p, k, q = 1.3, 0.7, 2.0, 1.0, 2.0, -0.5
    game = scalar_game(a, c, h, p, k, q)
    theta, phi = ([z] for z in doubles(-1.0, 3.0))
    for _ in range(400):
        step = sprig.leader_gradient(*game, theta, phi, method, **options)[0]
        answer = torch.autograd.grad(game[1](theta, phi), phi)[0]
        with torch.no_grad():
            theta[0] -= 0.1 * step
            phi[0] -= 0.3 * answer
    x = (a * p + rho * c * k * q) / (a + rho * c * k**2)
    assert theta[0].item() == pytest.approx(x, abs=1e-9) and phi[0].item() == pytest.approx(k * x, abs=1e-9)


def test_leading_pays():
    """At the Stackelberg point (0.2, 0.4) the leader loses 0.4, at Nash's (1, 2) it loses 2."""
    leader_loss_fn, follower_loss_fn = scalar_game()
    losses = {}
    for method, x in (("first-order", 1.0), ("implicit", 0.2)):
        theta, phi = ([z] for z in doubles(x, 2 * x))
        assert abs(sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, method)[0].item()) < 1e-12
        losses[method] = leader_loss_fn(theta, phi).item()
    assert losses == {"first-order": pytest.approx(2), "implicit": pytest.approx(0.4)}


# -- The vector game -------------------------------------------------------------------------------
def spectrum(rng, size, condition):
    """A symmetric matrix with eigenvalues from 1 to `condition`."""
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return torch.from_numpy(basis * np.geomspace(1, condition, size) @ basis.T)


@pytest.mark.parametrize(("leader_size", "follower_size"), [(4, 9), (9, 4)])
def test_vector_game_finds_the_stackelberg_point(leader_size, follower_size):
    rng = np.random.default_rng(3)
    A, C, H = (spectrum(rng, size, 1e4) for size in (leader_size, follower_size, follower_size))
    K, p, q = (torch.from_numpy(rng.normal(size=s)) for s in ((follower_size, leader_size), leader_size, follower_size))

    def quadratic(matrix, x):
        return 0.5 * x @ matrix @ x

    def leader_loss_fn(theta, phi):
        return quadratic(A, theta[0] - p) + quadratic(C, phi[0] - q)

    def follower_loss_fn(theta, phi):
        return quadratic(H, phi[0] - K @ theta[0])

    def gradient(x, y):
        theta, phi = ([z.clone().requires_grad_()] for z in (x, y))
        return sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, "implicit", **EXACT)[0]

    x, y = (torch.from_numpy(rng.normal(size=size)) for size in (leader_size, follower_size))
    assert distance([gradient(x, y)], [A @ (x - p) + K.T @ C @ (y - q)]) < 1e-8

    # On y = Kx the gradient is affine in x: its zero is the leader's best point.
    constant = gradient(torch.zeros_like(x), torch.zeros_like(y))
    unit = torch.eye(leader_size, dtype=torch.float64)
    matrix = torch.stack([gradient(e, K @ e) - constant for e in unit], 1)
    expected = torch.linalg.solve(A + K.T @ C @ K, A @ p + K.T @ C @ q)
    assert distance([torch.linalg.solve(matrix, -constant)], [expected]) < 1e-6
    assert gradient(expected, K @ expected).norm() < 1e-8 * constant.norm()


# -- Limits ----------------------------------------------------------------------------------------
def test_strong_damping_gives_the_first_order_gradient():
    game = tiny_game(sprig.Args())
    first_order = sprig.leader_gradient(*game)
    errors = []
    for damping in (1e3, 1e4, 1e5):
        total = sprig.leader_gradient(*game, "implicit", **{**EXACT, "damping": damping})
        errors.append(distance(total, first_order))
    assert errors[2] < 1e-4
    for a, b in zip(errors, errors[1:]):
        assert a / b == pytest.approx(10, rel=0.02), "the correction falls like 1/λ"


def test_damping_of_one_over_eta_is_one_step_of_size_eta():
    args = sprig.Args(leader_objective="log-prob", ent_coef=0.1)  # smooth: no clip lies in the way
    leader_loss_fn, follower_loss_fn, theta, phi = tiny_game(args)
    first_order = sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi)
    # The unroll is also taken at another point, φ⁺: this part is first order in η, too, and not the implicit one's.
    moved = torch.autograd.grad(follower_loss_fn(theta, phi), phi)
    gaps, corrections = [], []
    for step_size in (1e-2, 5e-3, 2.5e-3):
        answer = [(x - step_size * dx).detach().requires_grad_() for x, dx in zip(phi, moved)]
        at_answer = torch.autograd.grad(leader_loss_fn(theta, answer), theta)
        one_step = sprig.leader_gradient(
            leader_loss_fn, follower_loss_fn, theta, phi, "unrolled", step_size=step_size, num_steps=1
        )
        options = {**EXACT, "damping": 1 / step_size}
        implicit = sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, "implicit", **options)
        unrolled_part = [a - b for a, b in zip(one_step, at_answer)]
        implicit_part = [a - b for a, b in zip(implicit, first_order)]
        gaps.append(sum((a - b).square().sum() for a, b in zip(unrolled_part, implicit_part)).sqrt().item())
        corrections.append(sum(a.square().sum() for a in implicit_part).sqrt().item())
    for a, b in zip(corrections, corrections[1:]):
        assert a / b == pytest.approx(2, rel=0.1), "the correction is of first order in η"
    for a, b in zip(gaps, gaps[1:]):
        assert a / b == pytest.approx(4, rel=0.1), "the difference is of second order"


# -- A small neural game ---------------------------------------------------------------------------
class SoftmaxGame:
    """Leader: tanh features. Follower: linear softmax on them with a ridge penalty, hence one best response."""

    def __init__(self):
        generator = torch.Generator().manual_seed(4)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.inputs, self.labels, self.wanted = draw(20, 3), draw(20, 4).argmax(1), draw(20, 4).softmax(1)
        self.theta = [draw(3, 5).requires_grad_(), draw(5).requires_grad_()]
        self.phi = self.best_response(self.theta)

    def logits(self, theta, phi):
        return torch.tanh(self.inputs @ theta[0] + theta[1]) @ phi[0]

    def leader_loss(self, theta, phi):
        penalty = 0.01 * sum((x**2).sum() for x in theta)
        return torch.nn.functional.cross_entropy(self.logits(theta, phi), self.wanted) + penalty

    def follower_loss(self, theta, phi):
        return torch.nn.functional.cross_entropy(self.logits(theta, phi), self.labels) + 0.05 * (phi[0] ** 2).sum()

    def best_response(self, theta):
        """Newton's method, down to rounding."""
        phi = torch.zeros(5, 4, dtype=torch.float64)
        theta = [x.detach() for x in theta]
        for _ in range(10):
            slope = torch.func.grad(lambda x: self.follower_loss(theta, [x]))(phi)
            hessian = torch.func.hessian(lambda x: self.follower_loss(theta, [x]))(phi).view(20, 20)
            phi = phi - torch.linalg.solve(hessian, slope.flatten()).view(5, 4)
        assert slope.norm() < 1e-14
        return [phi.requires_grad_()]


def test_implicit_gradient_is_that_of_the_resolved_best_response():
    game = SoftmaxGame()
    got = sprig.leader_gradient(game.leader_loss, game.follower_loss, game.theta, game.phi, "implicit", **EXACT)
    expected = central_differences(lambda theta: game.leader_loss(theta, game.best_response(theta)), game.theta, 1e-5)
    first_order = sprig.leader_gradient(game.leader_loss, game.follower_loss, game.theta, game.phi)
    assert distance(got, expected) < 1e-7
    assert distance(first_order, expected) > 0.1, "the game must tell the two apart"


def test_envelope_a_leader_that_wants_what_the_follower_wants_has_nothing_to_anticipate():
    game = SoftmaxGame()

    def leader_loss_fn(theta, phi):
        return 3 * game.follower_loss(theta, phi) + (theta[0] ** 3).sum()

    def gradient(phi, method):
        return sprig.leader_gradient(leader_loss_fn, game.follower_loss, game.theta, phi, method, **options[method])

    options = {"first-order": {}, "unrolled": {"step_size": 0.3, "num_steps": 3}, "implicit": EXACT}
    elsewhere = [(1.2 * game.phi[0]).detach().requires_grad_()]
    for method in METHODS:
        assert distance(gradient(game.phi, method), gradient(game.phi, "first-order")) < 1e-12
        assert distance(gradient(elsewhere, method), gradient(elsewhere, "first-order")) > 1e-3


# -- The losses of SPRIG ---------------------------------------------------------------------------
SMOOTH = {"leader_value_coef": 0.3, "perception_cost_weight": 0.5, "ent_coef": 0.1}


def test_unrolled_gradient_equals_finite_differences():
    leader_loss_fn, follower_loss_fn, theta, phi = tiny_game(sprig.Args(**SMOOTH))

    def after_three_steps(theta):
        answer = phi
        for _ in range(3):
            slope = torch.autograd.grad(follower_loss_fn(theta, answer), answer)
            answer = [(x - 0.05 * dx).detach().requires_grad_() for x, dx in zip(answer, slope)]
        return leader_loss_fn(theta, answer)

    got = sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, "unrolled", step_size=0.05, num_steps=3)
    assert distance(got, central_differences(after_three_steps, theta)) < 1e-6


def test_implicit_gradient_equals_dense_linear_algebra():
    leader_loss_fn, follower_loss_fn, theta, phi = tiny_game(sprig.Args(**SMOOTH))

    def flat(tensors):
        return torch.cat([x.flatten() for x in tensors])

    v = flat(torch.autograd.grad(leader_loss_fn(theta, phi), phi))
    slope = flat(torch.autograd.grad(follower_loss_fn(theta, phi), phi, create_graph=True))
    rows = [torch.autograd.grad(x, phi + theta, retain_graph=True, materialize_grads=True) for x in slope]
    H, M = (torch.stack([flat(row[part]) for row in rows]) for part in (slice(0, len(phi)), slice(len(phi), None)))
    damping = 0.1 - torch.linalg.eigvalsh(H).min().item()
    assert damping > 0.1, "PPO's loss has directions of negative curvature"
    expected = flat(sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi))
    expected = expected - M.T @ torch.linalg.solve(H + damping * torch.eye(len(H), dtype=H.dtype), v)
    info = {}
    options = {"damping": damping, "cg_iterations": 200, "cg_tolerance": 1e-12, "info": info}
    got = sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, "implicit", **options)
    assert distance(got, [expected]) < 1e-9 and info["leader/cg_residual"] <= 1e-12


# -- Safeguards ------------------------------------------------------------------------------------
def test_conjugate_gradients_stop_on_negative_curvature():
    info = {}
    game = scalar_game(h=-2.0)
    theta, phi = ([z] for z in doubles(0.5, 0.3))
    got = sprig.leader_gradient(*game, theta, phi, "implicit", **EXACT, info=info)
    assert got[0].item() == -0.5, "no correction along a direction that has no minimum"
    assert info["leader/cg_residual"] == 1 and info["leader/correction_ratio"] == 0
    got = sprig.leader_gradient(*game, theta, phi, "implicit", **{**EXACT, "damping": 5.0})
    assert got[0].item() == pytest.approx(-0.5 - 2 / (-2 + 5) * 2 * 0.3), "damping mends it"


def test_conjugate_gradients_keep_what_they_had_before_negative_curvature():
    matrix = torch.diag(torch.tensor([4.0, 1.0, -0.5], dtype=torch.float64))
    v = torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64)
    x, residual = sprig.conjugate_gradients(lambda p: matrix @ p, v, 100, 1e-12)
    assert 0.01 < residual.item() and residual.item() == pytest.approx(((v - matrix @ x).norm() / v.norm()).item())
    one_step = v * (v @ v) / (v @ matrix @ v)
    assert x.norm() >= one_step.norm() > 0 and x.isfinite().all()


def test_conjugate_gradients_stop_at_their_tolerance():
    matrix, v = spectrum(np.random.default_rng(0), 30, 100.0), torch.ones(30, dtype=torch.float64)
    products = []

    def product(p):
        products.append(p)
        return matrix @ p

    _, residual = sprig.conjugate_gradients(product, v, 1000, 1e-3)
    assert 1e-6 < residual <= 1e-3 and 3 < len(products) < 60
    _, residual = sprig.conjugate_gradients(product, v, 3, 1e-3)
    assert residual > 1e-3
    x, residual = sprig.conjugate_gradients(product, torch.zeros_like(v), 10, 1e-3)
    assert not x.any() and residual == 0, "nothing to solve"


@pytest.mark.parametrize("method", METHODS)
def test_clamp_bounds_the_correction_and_keeps_its_direction(method):
    game = tiny_game(sprig.Args(**SMOOTH))
    options = {"step_size": 0.5, "damping": 1.0}
    first_order, free = (torch.cat([x.flatten() for x in sprig.leader_gradient(*game, m, **options)])
                         for m in ("first-order", method))  # fmt: skip
    ratio = ((free - first_order).norm() / first_order.norm()).item()
    for clamp in (0.0, 0.3 * ratio, 3 * ratio):
        info = {}
        total = torch.cat(
            [x.flatten() for x in sprig.leader_gradient(*game, method, **options, clamp=clamp, info=info)]
        )
        expected = first_order + min(1, clamp / ratio) * (free - first_order)
        torch.testing.assert_close(total, expected)
        assert info["leader/correction_ratio"].item() == pytest.approx(ratio), "before the clamp"
        cosine = (total @ first_order / total.norm() / first_order.norm()).item()
        assert info["leader/correction_cosine"].item() == pytest.approx(cosine)


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

    every_option = {"step_size": 0.1, "num_steps": 2, "damping": 0.5, "cg_iterations": 10, "cg_tolerance": 1e-6}
    got = sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, method, **every_option, clamp=None)
    assert isinstance(got, list) and [x.shape for x in got] == [x.shape for x in theta]
    assert not any(x.requires_grad for x in got) and got[0].any()
    torch.testing.assert_close(got[1], 2 * theta[1].detach())
    assert not got[2].any()
    assert all(torch.equal(a, b) for a, b in zip(before, theta + phi))
    assert theta[0].grad.tolist() == [7, 7, 7] and all(x.grad is None for x in theta[1:] + phi)


@pytest.mark.parametrize("method", METHODS)
def test_players_that_do_not_meet_have_no_correction(method):
    theta, phi = ([z] for z in doubles(0.5, 0.3))

    def leader_loss_fn(theta, phi):
        return theta[0] ** 2

    for follower_loss_fn in (lambda theta, phi: phi[0] ** 2, lambda theta, phi: 2 * phi[0]):
        info = {}
        assert sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, method, info=info) == [1.0]
        assert info["leader/correction_ratio"] == 0 and info["leader/correction_cosine"].item() == pytest.approx(1)
        assert all(value.isfinite() for value in info.values())


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown leader gradient 'third-order'"):
        sprig.leader_gradient(*scalar_game(), *([z] for z in doubles(0.5, 0.3)), "third-order")


# -- Attention -------------------------------------------------------------------------------------
def test_tiled_attention_can_be_differentiated_twice():
    inputs = [torch.randn(3, 6, width, dtype=torch.float64, requires_grad=True) for width in (2, 2, 4)]
    assert torch.autograd.gradcheck(sprig.TiledAttention.apply, inputs)
    assert torch.autograd.gradgradcheck(sprig.TiledAttention.apply, inputs)


def test_a_block_of_tiled_attention_can_be_differentiated_twice(monkeypatch):
    """As the leader calls it: query, key and value are slices of one product."""
    block, x = sprig.AttentionBlock(32, gated=True), torch.randn(2, 400, 32, requires_grad=True)
    torch.nn.init.constant_(block.gate, 0.5)
    seconds = []
    for attend in (sprig.attend, plain_attention):
        with monkeypatch.context() as patch:
            patch.setattr(sprig, "attend", attend)
            output = block(x)[0]
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(slope.square().sum(), list(block.parameters())))
    for a, b in zip(*seconds):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
        assert b.abs().max() > 0


def test_fused_and_plain_attention_agree_in_second_derivatives():
    inputs = [torch.randn(2, 400, width, requires_grad=True) for width in (4, 4, 32)]
    grad, direction = torch.randn(2, 400, 32), [torch.randn_like(x) for x in inputs]
    results = []
    for attend in (sprig.attend, plain_attention):
        slopes = torch.autograd.grad(attend(*inputs), inputs, grad, create_graph=True)
        product = sum((a * b).sum() for a, b in zip(slopes, direction))
        results.append(torch.autograd.grad(product, inputs))
    assert distance(*results) < 1e-5


def plain_losses(leader, follower, batch, args):
    """The losses of stackelberg_step with nothing shared between calls: each runs both networks anew."""

    def leader_loss_fn(theta, phi):
        features, attention = sprig.call_with(leader, theta, batch.obs, num_rows=0)
        cost = sprig.perception_cost(attention, args.perception_cost)
        return sprig.leader_loss(*sprig.call_with(follower, phi, features), cost, batch, args)[0]

    def follower_loss_fn(theta, phi):
        features = sprig.call_with(leader, theta, batch.obs)
        return sprig.follower_loss(*sprig.call_with(follower, phi, features), batch, args)[0]

    return leader_loss_fn, follower_loss_fn, list(leader.parameters()), list(follower.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_step_takes_the_total_derivative_and_plain_attention_gives_the_same(method, monkeypatch):
    settings = {"cost_rows": 0, "perception_cost_weight": 0.1, "max_grad_norm": 1e9, "implicit_damping": 300.0}
    args = sprig.Args(leader_gradient=method, correction_clamp=None, cg_iterations=100, cg_tolerance=1e-6, **settings)
    leader, follower, *_ = build(sprig, args)
    batch = random_batch(sprig, leader, follower, 8)
    for block in leader.blocks:
        torch.nn.init.constant_(block.gate, 0.7)  # at its first value, 0, attention would not matter
    monkeypatch.setattr(sprig, "attend", plain_attention)
    options = {"step_size": args.unroll_step_size, "damping": args.implicit_damping, "cg_tolerance": 1e-6}
    expected = sprig.leader_gradient(*plain_losses(leader, follower, batch, args), method, **options)
    first_order = sprig.leader_gradient(*plain_losses(leader, follower, batch, args))
    assert distance(first_order, expected) > 0.01
    monkeypatch.undo()  # the step below uses the fused attention

    idle = [torch.optim.SGD(player.parameters(), lr=0.0) for player in (leader, follower)]
    sprig.stackelberg_step(leader, follower, *idle, batch, args)
    assert distance([p.grad for p in leader.parameters()], expected) < 1e-3


def test_losses_of_a_step_are_reported_as_they_were_before_it():
    reports, kls = {}, {}
    for method in ("first-order", *METHODS):
        torch.manual_seed(3)
        args = sprig.Args(leader_gradient=method, learning_rate=1e-3)
        leader, follower, *optimizers = build(sprig, args)
        batch = random_batch(sprig, leader, follower, 8)
        batch = batch._replace(logprobs=batch.logprobs + 0.1 * torch.randn(8))
        with torch.no_grad():
            before = sprig.action_distribution(follower(leader(batch.obs))[0])
        follower_before = [p.detach().clone() for p in follower.parameters()]
        torch.manual_seed(3)  # the same query rows for the cost
        reports[method] = sprig.stackelberg_step(leader, follower, *optimizers, batch, args)
        with torch.no_grad():
            logits, _ = sprig.call_with(follower, follower_before, leader(batch.obs))
        moved = torch.distributions.kl_divergence(before, sprig.action_distribution(logits)).mean()
        kls[method] = moved.item()
        assert reports[method]["leader/kl"].item() == pytest.approx(moved.item(), rel=1e-3)
    for key in ("leader/utility", "leader/policy_term", "leader/perception_cost"):
        assert len({report[key].item() for report in reports.values()}) == 1, key
    assert len(set(kls.values())) == 3, "three gradients, three moves"
    tags = {method: {t for t in report if "correction" in t or "cg_" in t} for method, report in reports.items()}
    correction = {"leader/correction_ratio", "leader/correction_cosine"}
    assert tags == {
        "first-order": set(), "unrolled": correction, "implicit": correction | {"leader/cg_residual"}
    }  # fmt: skip


# -- Whole runs ------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_beamrider_trains_with_the_total_derivative(method, tmp_path):
    settings = {"num_envs": 2, "num_steps": 8, "minibatch_size": 8, "update_epochs": 1, "total_timesteps": 32}
    settings |= {"device": "cpu"}
    sprig.main(sprig.Args(leader_gradient=method, eval_episodes=0, run_dir=str(tmp_path / "run"), **settings))
    logged = scalars(tmp_path / "run")
    assert all(np.isfinite([value for _, value in points]).all() for points in logged.values())
    assert len(logged["leader/correction_ratio"]) == 2 and logged["leader/correction_ratio"][0][1] > 0
    assert -1 <= logged["leader/correction_cosine"][1][1] < 1
    assert ("leader/cg_residual" in logged) == (method == "implicit")


@pytest.mark.parametrize("method", METHODS)
def test_cartpole_is_solved_with_the_total_derivative(method, tmp_path):
    script = CONTINUOUS["sprig_continuous"]
    args = script.Args(
        env_id="CartPole-v1", total_timesteps=32_768, num_envs=4, num_steps=256, minibatch_size=128,
        learning_rate=1e-3, target_kl=None, threads=1, eval_episodes=10, run_dir=str(tmp_path / "run"),
        leader_gradient=method, device="cpu",
    )  # fmt: skip
    evaluation = script.main(args)
    logged = scalars(tmp_path / "run")
    assert np.mean([value for _, value in logged["leader/correction_ratio"]]) > 0.01
    returns = [value for _, value in logged["charts/episodic_return"]]
    assert np.mean(returns[-10:]) > 400 and evaluation["mean"] > 400
    assert np.mean(returns[:20]) < 50, "it was not solved to begin with"


BAD = {
    "no step": ({"unroll_steps": 0}, "--unroll-steps must be at least 1"),
    "no step size": ({"unroll_step_size": 0.0}, "--unroll-step-size must be positive"),
    "negative damping": ({"implicit_damping": -1.0}, "--implicit-damping must not be negative"),
    "damping is no number": ({"implicit_damping": float("nan")}, "--implicit-damping must not be negative"),
    "no iteration": ({"cg_iterations": 0}, "--cg-iterations must be at least 1"),
    "negative tolerance": ({"cg_tolerance": -1e-3}, "--cg-tolerance must not be negative"),
    "negative clamp": ({"correction_clamp": -1.0}, "--correction-clamp must not be negative"),
    "no leader": ({"leader_gradient": "implicit", "update": "joint"}, "set --update stackelberg"),
    "not unrolled": ({"unroll_steps": 5}, "--unroll-steps would do nothing here: it is for --leader-gradient unrolled"),
    "not implicit": ({"cg_iterations": 5, "leader_gradient": "unrolled"}, "--cg-iterations would do nothing here"),
    "nothing to clamp": ({"correction_clamp": None}, "--correction-clamp would do nothing here"),
    "literal": ({"leader_gradient": "unrolled", "paper_literal": True}, "--paper-literal decides --leader-gradient"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("script", [sprig, CONTINUOUS["sprig_continuous"]], ids=["atari", "continuous"])
def test_bad_options_are_one_clear_line(script, case):
    changes, message = BAD[case]
    with pytest.raises(SystemExit) as error:
        script.check_args(script.Args(**changes))
    assert message in error.value.code and error.value.code.startswith("error: ") and "\n" not in error.value.code
