"""SPRIG's game: who moves, along which gradient, and what attention costs."""

import dataclasses
import math
import os
import shutil
import sysconfig
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, TWINS, build, last_gradients, plain_attention, random_batch

import ppo_atari_baseline as ppo
import sprig_atari as sprig


def clones(*modules):
    return [[p.detach().clone() for p in module.parameters()] for module in modules]


def flat(*modules):
    return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()])


def same(parameters, others):
    return all(torch.equal(a, b) for a, b in zip(parameters, others))


# -- Moves -----------------------------------------------------------------------------------------
def test_each_player_moves_its_own_parameters_only(monkeypatch):
    args = sprig.Args()
    leader, follower, *optimizers = build(sprig, args)
    batch = random_batch(sprig, leader, follower)
    states = [clones(leader, follower)]
    real = sprig.descend

    def spy(*inputs, **player):
        norm = real(*inputs, **player)
        states.append(clones(leader, follower))
        return norm

    monkeypatch.setattr(sprig, "descend", spy)
    sprig.stackelberg_step(leader, follower, *optimizers, batch, args)
    before, after_leader, after_follower = states
    assert not same(before[0], after_leader[0]) and same(before[1], after_leader[1])
    assert same(after_leader[0], after_follower[0]) and not same(after_leader[1], after_follower[1])


def test_follower_answers_the_features_from_after_the_leaders_move():
    args = sprig.Args(max_grad_norm=1e9)
    leader, follower, *optimizers = build(sprig, args)
    batch = random_batch(sprig, leader, follower)
    phi = clones(follower)[0]
    sprig.stackelberg_step(leader, follower, *optimizers, batch, args)
    taken = last_gradients(optimizers[1], follower)
    with torch.no_grad():  # put the follower back: the leader has moved
        for p, old in zip(follower.parameters(), phi):
            p.copy_(old)
        features = leader(batch.obs)
    loss, _ = sprig.follower_loss(*follower(features), batch, args)
    for got, expected in zip(taken, torch.autograd.grad(loss, list(follower.parameters()))):
        torch.testing.assert_close(got, expected)


# -- Between PPO and the game -----------------------------------------------------------------------
def moved_by(update, changes=None, **settings):
    """Parameters of leader and follower after one step of --update from a common start."""
    args = sprig.Args(**{"update": update, "learning_rate": 1e-3, "max_grad_norm": 1e9, **settings})
    torch.manual_seed(1)
    leader, follower, *optimizers = build(sprig, args)
    for block in leader.blocks:  # at its first value, 0, attention would not matter
        torch.nn.init.constant_(block.gate, 0.5)
    batch = random_batch(sprig, leader, follower, 8)._replace(**(changes or {}))
    start = clones(leader, follower)
    step = {"stackelberg": sprig.stackelberg_step, "joint": sprig.joint_step}.get(update, sprig.simultaneous_step)
    step(leader, follower, *optimizers, batch, args)
    for old, new in zip(start, clones(leader, follower)):
        assert not same(old, new), "nothing was moved"
    return clones(leader, follower)


def close(a, b):
    return all(torch.allclose(x, y, rtol=0, atol=2e-5) for x, y in zip(sum(a, []), sum(b, [])))


def test_each_rung_from_ppo_to_the_game_changes_one_thing():
    for settings in ({}, {"max_grad_norm": 0.1}):  # joint -> stopped: the value error no longer reaches the leader
        assert close(moved_by("joint", vf_coef=0, **settings), moved_by("stopped", vf_coef=0, **settings))
        assert not close(moved_by("joint", **settings), moved_by("stopped", **settings))
    one, other = moved_by("stopped"), moved_by("stopped", {"returns": torch.randn(8)})
    assert same(one[0], other[0]) and not same(one[1], other[1])
    # stopped -> separate: each its own norm clip
    assert close(moved_by("stopped"), moved_by("separate"))
    assert not close(moved_by("stopped", max_grad_norm=1e-4), moved_by("separate", max_grad_norm=1e-4))
    # separate -> simultaneous: the leader's own loss, which has α, the cost and no entropy bonus
    mine = {"cooperation_weight": 1.0, "ent_coef": 0.0}
    assert close(moved_by("separate", **mine), moved_by("simultaneous", **mine))
    assert not close(moved_by("separate"), moved_by("simultaneous", perception_cost_weight=10.0, cost_rows=0))
    # simultaneous -> stackelberg: the leader moves alike, the follower answers what it then shows
    one, other = moved_by("simultaneous", cost_rows=0), moved_by("stackelberg", cost_rows=0)
    assert close(one[:1], other[:1]) and not close(one[1:], other[1:])


# -- Losses against finite differences -------------------------------------------------------------
class Tiny(torch.nn.Module):
    def __init__(self, width_in, *widths_out):
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width_in, w) for w in widths_out)

    def forward(self, x):
        outputs = [head(x) for head in self.heads]
        return torch.tanh(outputs[0]) if len(outputs) == 1 else (outputs[0], outputs[1].squeeze(-1))


def tiny_game(args):
    """Small smooth players in float64, the rollout's policy a little away from the current one."""
    torch.manual_seed(1)
    leader, follower = Tiny(5, 6).double(), Tiny(6, 3, 1).double()
    obs = torch.randn(16, 5, dtype=torch.float64)
    actions = torch.randint(3, (16,))
    logits, values = follower(leader(obs))
    logprobs = sprig.action_distribution(logits).log_prob(actions).detach()
    logprobs = logprobs + 0.05 * torch.randn_like(logprobs)
    columns = (values.detach() + torch.randn(16), torch.randn(16), torch.randn(16))
    batch = sprig.Batch(obs, actions, logprobs, *(x.double() for x in columns))

    def attention(features):  # (16, 6, 6), depends on theta
        return [(features.unsqueeze(2) * features.unsqueeze(1)).softmax(-1)]

    def leader_loss_fn(theta, phi):
        features = sprig.call_with(leader, theta, obs)
        cost = sprig.perception_cost(attention(features), args.perception_cost)
        return sprig.leader_loss(*sprig.call_with(follower, phi, features), cost, batch, args)[0]

    def follower_loss_fn(theta, phi):
        return sprig.follower_loss(*sprig.call_with(follower, phi, sprig.call_with(leader, theta, obs)), batch, args)[0]

    return leader_loss_fn, follower_loss_fn, list(leader.parameters()), list(follower.parameters())


def central_differences(function, parameters, step=1e-6):
    gradients = [torch.zeros_like(p) for p in parameters]
    for p, gradient in zip(parameters, gradients):
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                moved = [q.detach().clone() if q is p else q.detach() for q in parameters]
                moved[[q is p for q in parameters].index(True)].view(-1)[i] += sign * step
                ends.append(function(moved).item())
            gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return gradients


@pytest.mark.parametrize("objective", ["clipped", "log-prob"])
@pytest.mark.parametrize("cost", ["entropy", "concentration"])
def test_leader_gradient_equals_finite_differences(objective, cost):
    args = sprig.Args(
        leader_objective=objective, perception_cost=cost, perception_cost_weight=0.5, leader_value_coef=0.3
    )
    leader_loss_fn, follower_loss_fn, theta, phi = tiny_game(args)
    got = sprig.leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, "first-order")
    for a, b in zip(got, central_differences(lambda t: leader_loss_fn(t, phi), theta)):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("clip_value_loss", [False, True])
def test_follower_gradient_equals_finite_differences(clip_value_loss):
    args = sprig.Args(clip_value_loss=clip_value_loss)
    _, follower_loss_fn, theta, phi = tiny_game(args)
    got = torch.autograd.grad(follower_loss_fn(theta, phi), phi)
    for a, b in zip(got, central_differences(lambda f: follower_loss_fn(theta, f), phi)):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_a_clipped_value_counts_where_its_error_is_the_larger(script):
    """Known numbers: values move from 1 to 1.5, 0.5 and 1.1 where the return is 0; by 0.1 at most they move to 1.1, 0.9
    and 1.1 (CleanRL's and OpenAI baselines' rule; stable-baselines3's leaves out the larger).
    """
    args = script.Args(clip_value_loss=True, clip_coef=0.1, vf_coef=0.25, ent_coef=0.0)
    values, old, zeros = torch.tensor([1.5, 0.5, 1.1]), torch.ones(3), torch.zeros(3)
    batch = script.Batch(zeros, zeros.long(), torch.full((3,), -math.log(2)), old, zeros, zeros)
    loss, info = script.follower_loss(torch.zeros(3, 2), values, batch, args)
    expected = (1.5**2 + 0.9**2 + 1.1**2) / 3
    torch.testing.assert_close(info["losses/value_loss"], torch.tensor(expected))
    torch.testing.assert_close(loss, torch.tensor(0.25 * expected))


def test_leader_gradient_refuses_an_unknown_method():
    with pytest.raises(ValueError, match="unknown leader gradient"):
        sprig.leader_gradient(None, None, [], [], "second-order")


def test_objectives_have_one_gradient_where_the_ratio_is_one():
    logits = torch.randn(64, 5, dtype=torch.float64, requires_grad=True)
    actions, advantages = torch.randint(5, (64,)), torch.randn(64, dtype=torch.float64)
    logprobs = sprig.action_distribution(logits).log_prob(actions)
    old = logprobs.detach()
    objectives = (
        (logprobs * advantages).mean(),
        ((logprobs - old).exp() * advantages).mean(),
        sprig.policy_objective(logprobs - old, advantages, 0.2).mean(),
    )
    first, *others = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in objectives)
    for other in others:
        torch.testing.assert_close(first, other)


def test_clipped_objective_stops_where_the_ratio_has_moved_far_enough():
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    sprig.policy_objective(log_ratio, advantages, 0.2).sum().backward()
    assert log_ratio.grad[:2].tolist() == [0, 0] and (log_ratio.grad[2:] != 0).all()


def test_cooperation_weight_lies_on_the_return():
    batch = sprig.Batch(None, torch.tensor([0]), torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(1))
    logits, values, cost = torch.zeros(1, 1), torch.zeros(1), torch.full((1,), 0.5)  # ratio 1, advantage 1
    args = sprig.Args(cooperation_weight=0.7, perception_cost_weight=0.1)
    loss, info = sprig.leader_loss(logits, values, cost, batch, args)
    assert info["leader/utility"].item() == pytest.approx(0.7 * 1.0 - 0.3 * 0.1 * 0.5)  # Eq. (8)
    assert loss.item() == pytest.approx(-info["leader/utility"].item())


# -- Perception cost -------------------------------------------------------------------------------
def uniform(n):
    return torch.full((2, n, n), 1 / n)


def one_hot(n):  # every query looks at location 0
    weights = torch.zeros(2, n, n)
    weights[:, :, 0] = 1
    return weights


def permutation(n):  # every query looks at a location of its own
    return torch.eye(n)[torch.randperm(n)].expand(2, n, n)


@pytest.mark.parametrize(
    ("kind", "make", "expected"),
    [
        ("entropy", uniform, 1), ("entropy", one_hot, 0), ("entropy", permutation, 0),
        ("concentration", uniform, 0), ("concentration", one_hot, 1), ("concentration", permutation, 0),
        ("l1", uniform, 1), ("l1", one_hot, 1), ("l1", permutation, 1),
    ],
)  # fmt: skip
def test_known_costs(kind, make, expected):
    cost = sprig.perception_cost([make(n) for n in (400, 81, 49)], kind)
    assert cost.shape == (2,)
    torch.testing.assert_close(cost, torch.full((2,), float(expected)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["entropy", "concentration", "l1"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_costs_lie_between_0_and_1_and_only_l1_has_no_gradient(kind, scale):
    scores = (scale * torch.randn(4, 49, 49)).requires_grad_()
    cost = sprig.perception_cost([scores.softmax(-1)], kind)
    assert (cost >= 0).all() and (cost <= 1).all()
    (gradient,) = torch.autograd.grad(cost.sum(), scores)
    assert gradient.isfinite().all()
    if kind == "l1":
        assert (gradient == 0).all()
    elif scale == 1.0:
        assert gradient.abs().max() > 1e-6


def test_entropy_of_sampled_rows_is_unbiased():
    torch.manual_seed(2)
    block = sprig.AttentionBlock(32, gated=True)
    torch.nn.init.normal_(block.project.weight, std=1.0)  # rows that differ in entropy
    x = torch.randn(2, 400, 32)
    with torch.no_grad():
        exact = sprig.perception_cost([block(x, num_rows=0)[1]], "entropy")
        draws = torch.stack([sprig.perception_cost([block(x, num_rows=24)[1]], "entropy") for _ in range(400)])
    error = draws.std(0) / 400**0.5
    assert (error > 0).all(), "the draws must differ"
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()


def test_sampled_rows_are_refused_for_concentration():
    with pytest.raises(ValueError, match="all 49 query rows"):
        sprig.perception_cost([torch.full((1, 5, 49), 1 / 49)], "concentration")
    with pytest.raises(ValueError, match="unknown perception cost"):
        sprig.perception_cost([uniform(4)], "l2")


def test_concentration_trains_with_all_rows():
    args = sprig.Args(perception_cost="concentration", perception_cost_weight=1.0)
    leader, follower, *optimizers = build(sprig, args)
    info = sprig.stackelberg_step(leader, follower, *optimizers, random_batch(sprig, leader, follower, 8), args)
    assert 0 < info["leader/perception_cost"] < 1


def test_perception_cost_in_reward_is_subtracted():
    args = sprig.Args(num_envs=2, num_steps=3, perception_cost_weight=0.1, perception_cost_in_reward=True, cost_rows=0)
    leader, *_ = build(sprig, args)
    obs = torch.randint(0, 256, (3, 2, 4, 84, 84), dtype=torch.uint8)
    rollout = sprig.Rollout(obs, *(torch.ones(3, 2) for _ in range(7)))
    rewards = sprig.learner_rewards(rollout, leader, args)
    cost = sprig.perception_cost(leader(obs.flatten(0, 1), num_rows=0)[1], "entropy").view(3, 2)
    torch.testing.assert_close(rewards, 1 - 0.1 * cost)


# -- Attention -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "n", "channels", "width", "samples", "scale"),
    [
        ("sprig_atari", 400, 32, 4, 11, 1),
        ("sprig_atari", 400, 32, 4, 11, 30),
        ("sprig_atari", 81, 64, 8, 3, 1),
        ("sprig_atari", 49, 64, 8, 3, 1),
        ("sprig_continuous", 17, 16, 4, 5, 1),
        ("sprig_continuous", 120, 16, 4, 5, 1),
        ("sprig_continuous", 348, 16, 4, 5, 30),
    ],
)
def test_fused_and_plain_attention_agree(name, n, channels, width, samples, scale):
    """In whole tiles and the rest of one, and with scores whose exponentials would overflow."""
    script = (TWINS | CONTINUOUS)[name]
    query, key, value = (torch.randn(samples, n, size, requires_grad=True) for size in (width, width, channels))
    grad = torch.randn(samples, n, channels)
    outputs = [attend(scale * query, key, value) for attend in (script.attend, plain_attention)]
    tolerance = dict.fromkeys(("atol", "rtol"), 1e-5 * scale)  # the larger a score, the coarser its exponential
    torch.testing.assert_close(*outputs, **tolerance)
    for a, b in zip(*(torch.autograd.grad(output, (query, key, value), grad) for output in outputs)):
        torch.testing.assert_close(a, b, **tolerance)


def test_attention_is_what_pytorch_computes():
    query, key, value = (torch.randn(3, 400, width) for width in (4, 4, 32))
    reference = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(sprig.attend(query, key, value), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_the_products_precision_is_the_one_asked_for(script, vendor, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id : {vendor}")
    for precision in ("highest", "high", "medium"):
        script.set_matmul_precision(precision)
        by_onednn = precision == "high" and vendor == "AuthenticAMD"
        assert torch.get_float32_matmul_precision() == ("medium" if by_onednn else precision)
        assert torch.backends.cudnn.allow_tf32 == (precision != "highest")


def moved_by_ten_updates(script, gate=0.0, precision="highest"):
    """What ten steps on one minibatch add to all parameters, from the same seeds every time."""
    torch.manual_seed(0)
    args = script.Args(minibatch_size=20)
    leader, follower, *optimizers = build(script, args)
    if gate:
        for block in leader.blocks:
            torch.nn.init.constant_(block.gate, gate)
    start = flat(leader, follower)
    batch = random_batch(script, leader, follower, 20)
    script.set_matmul_precision(precision)
    step = sprig.stackelberg_step if script is sprig else ppo.joint_step
    torch.manual_seed(1)
    for _ in range(10):
        step(leader, follower, *optimizers, batch, args)
    return flat(leader, follower) - start


def test_default_products_leave_the_same_parameters_after_ten_updates(script):
    """Whichever library computes them. Where there is no AMX, "medium" is float32 by oneDNN, the default on AMD."""
    cpuinfo = Path("/proc/cpuinfo")
    amx = not cpuinfo.exists() or "amx" in cpuinfo.read_text()
    precisions = ("highest", script.Args().matmul_precision if amx else "medium")
    moved = [moved_by_ten_updates(script, precision=precision) for precision in precisions]
    assert moved[0].abs().max() > 1e-4
    torch.testing.assert_close(*moved, atol=1e-5, rtol=0)


def test_tiled_and_plain_attention_leave_the_same_parameters_after_ten_updates(monkeypatch):
    moved = []
    for attend in (sprig.attend, plain_attention):
        monkeypatch.setattr(sprig, "attend", attend)
        moved.append(moved_by_ten_updates(sprig, gate=0.5))  # at 0 attention would not show
    assert moved[0].abs().max() > 1e-4
    torch.testing.assert_close(*moved, atol=1e-5, rtol=0)


def test_an_encoder_in_bfloat16_differs_by_its_rounding_alone(script):
    """Also what it leaves: features and gradients in float32, with every method of the leader's gradient."""
    features, gradients = [], []
    for precision in ("highest", "bfloat16"):
        torch.manual_seed(0)
        args = script.Args(minibatch_size=8, matmul_precision=precision)
        leader, follower, *optimizers = build(script, args)
        if script is sprig:
            for block in leader.blocks:
                torch.nn.init.constant_(block.gate, 0.5)
        batch = random_batch(script, leader, follower, 8)
        features.append(leader(batch.obs))
        logits, values = follower(features[-1])
        loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum() + values.sum()
        gradients.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(leader.parameters()))]))
        if script is sprig and precision == "bfloat16":
            assert all(rows.dtype == torch.float32 for rows in leader(batch.obs, 24)[1])
            assert leader.pictures(batch.obs)["leader/attention_received"].dtype == np.uint8
            for method in ("first-order", "unrolled", "implicit"):
                info = sprig.stackelberg_step(
                    leader, follower, *optimizers, batch, dataclasses.replace(args, leader_gradient=method)
                )
                assert all(value.isfinite() for value in info.values())
    assert features[1].dtype == gradients[1].dtype == torch.float32
    error = (features[1] - features[0]).norm() / features[0].norm()
    assert 1e-4 < error < 0.02  # half a unit in the last of 8 bits is 0.002
    assert torch.cosine_similarity(*gradients, 0) > 0.99


COMPILER = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.skipif(not COMPILER, reason="needs g++ and Python's headers")
@pytest.mark.parametrize("name", CONTINUOUS)
def test_compiled_and_plain_steps_leave_the_same_parameters_after_ten_updates(name):
    """The policy in a rollout and the whole of `update`; on vectors, which compile in a fraction of Atari's time."""
    script = CONTINUOUS[name]
    script.prepare_compiler(torch.device("cpu"))
    flags = {"env_id": "Pendulum-v1", "num_steps": 16, "minibatch_size": 8, "update_epochs": 5, "target_kl": None}
    flags |= {"cost_rows": 2} if name.startswith("sprig") else {}  # fewer rows than entries: they are drawn
    results, plain = [], None
    for compiled in (False, True):
        torch.manual_seed(0)
        args = script.Args(**flags, compile=compiled)
        envs = script.make_envs(args)
        leader = script.Leader(envs.single_observation_space, args)
        follower = script.Follower(leader.num_features, envs.single_action_space)
        optimizers = [script.make_optimizer(player, args) for player in (leader, follower)]
        for optimizer in optimizers:  # Adam's own 1e-5 makes steps out of the rounding of gradients that are nearly 0
            optimizer.param_groups[0]["eps"] = 1e-3
        rollout = script.allocate_rollout(args, envs, torch.device("cpu"))
        obs, _ = envs.reset(seed=1)
        script.collect_rollout(envs, obs, leader, follower, rollout, compiled)
        envs.close()
        plain = plain or rollout
        columns = (plain.obs, plain.actions, plain.logprobs, plain.values, torch.ones(16, 1), torch.zeros(16, 1))
        batch = script.Batch(*(x.flatten(0, 1) for x in columns))
        start = flat(leader, follower)
        script.update(leader, follower, *optimizers, batch, args)
        results.append((*rollout, flat(leader, follower) - start))
    assert results[0][-1].abs().max() > 1e-4
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def beamrider_frames():
    envs = sprig.make_envs(sprig.Args(num_envs=4))
    obs, _ = envs.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(60):
        obs, *_ = envs.step(rng.integers(9, size=4))
    envs.close()
    return torch.from_numpy(obs)


def spatial_std(args):
    leader, *_ = build(sprig, args)
    with torch.no_grad():
        return leader(beamrider_frames()).view(4, 64, 49).std(-1).mean().item()


def test_features_know_where_things_are_unless_read_literally():
    assert spatial_std(sprig.Args(feature_scale=1.0)) > 0.1
    assert spatial_std(sprig.check_args(sprig.Args(paper_literal=True))) < 0.01


def test_features_at_unit_scale_are_five_to_nine_times_the_nature_cnns():
    """Before training, in L1. The default scale makes them alike."""
    frames, ratios = beamrider_frames(), []
    for seed in range(8):
        sums = []
        for script, scale in ((sprig, {"feature_scale": 1.0}), (ppo, {})):
            torch.manual_seed(seed)
            leader, *_ = build(script, script.Args(**scale))
            with torch.no_grad():
                sums.append(leader(frames).abs().sum(1).mean().item())
        ratios.append(sums[0] / sums[1])
    assert 5 < min(ratios) and max(ratios) < 9
    assert sprig.Args.feature_scale * np.mean(ratios) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("attention", ["gated", "figure4", "none"])
def test_every_kind_of_attention_steps(attention):
    args = sprig.Args(attention=attention)
    leader, follower, *optimizers = build(sprig, args)
    batch = random_batch(sprig, leader, follower, 8)
    features, maps = leader(batch.obs, num_rows=0)
    assert features.shape == (8, 3136)
    assert [tuple(m.shape) for m in maps] == ([] if attention == "none" else [(8, n, n) for n in (400, 81, 49)])
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    info = sprig.update(leader, follower, *optimizers, batch, dataclasses.replace(args, minibatch_size=4))
    assert all(np.isfinite(list(info.values())))
    pictures = leader.pictures(batch.obs[:2])
    assert bool(pictures) == (args.attention != "none")
    for picture in pictures.values():
        assert picture.dtype == np.uint8 and picture.shape[-1] == 3


def test_frames_of_floats_are_read_and_left_as_they_are(script):
    """Those of a fork's environment; the scripts' own are bytes."""
    leader, follower, *_ = build(script, script.Args())
    frames = random_batch(script, leader, follower, 2).obs
    floats = frames.float()
    torch.testing.assert_close(leader(floats), leader(frames))
    assert torch.equal(floats, frames.float())


def test_paper_literal_sets_every_literal_reading():
    args = sprig.check_args(sprig.Args(paper_literal=True))
    assert args.cooperation_weight == 0.3 and args.perception_cost == "l1" and args.attention == "figure4"
    assert args.leader_objective == "log-prob" and args.leader_value_coef == 0 and args.update == "stackelberg"


@pytest.mark.parametrize("script", [sprig, ppo])
def test_encoders_take_frames_of_another_size(script):
    leader = script.Leader(gym.spaces.Box(0, 255, (4, 126, 126), np.uint8), script.Args())
    features = leader(torch.randint(256, (2, 4, 126, 126), dtype=torch.uint8))
    assert features.shape == (2, 64 * 12 * 12) == (2, leader.num_features)


def test_gates_start_at_zero_and_attention_then_changes_nothing():
    gated, _, *_ = build(sprig, sprig.Args(attention="gated"))
    plain, _, *_ = build(sprig, sprig.Args(attention="none"))
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("blocks")})
    obs = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    assert torch.equal(gated(obs), plain(obs))


@pytest.mark.parametrize("script", [sprig, CONTINUOUS["sprig_continuous"]], ids=lambda script: script.__name__)
def test_a_price_of_ones_own_is_paid_whoever_moves_first_and_in_the_reward(script, monkeypatch):
    """What README says: all that the leader pays for comes out of `perceive`."""
    perceive = script.perceive
    monkeypatch.setattr(script, "perceive", lambda *inputs: (lambda f, c: (f, c + 10))(*perceive(*inputs)))
    for method in ("stackelberg", "simultaneous"):
        env_id = {} if script is sprig else {"env_id": "CartPole-v1"}
        args = script.Args(update=method, minibatch_size=8, num_steps=4, num_envs=2, **env_id)
        args = dataclasses.replace(args, attention="none", perception_cost_in_reward=True)
        envs = script.make_envs(args)
        leader = script.Leader(envs.single_observation_space, args)
        follower = script.Follower(leader.num_features, envs.single_action_space)
        rollout = script.allocate_rollout(args, envs, torch.device("cpu"))
        obs, _ = envs.reset(seed=1)
        script.collect_rollout(envs, obs, leader, follower, rollout, False)
        envs.close()
        free = script.learner_rewards(rollout, leader, dataclasses.replace(args, perception_cost_in_reward=False))
        rewards = script.learner_rewards(rollout, leader, args)
        if script is sprig:  # on vectors the first call moves the normaliser
            torch.testing.assert_close(free - rewards, torch.full((4, 2), 10 * args.perception_cost_weight))
        assert rewards.shape == (4, 2)
        columns = (rollout.obs, rollout.actions, rollout.logprobs, rollout.values, rewards, rewards)
        batch = script.Batch(*(x.flatten(0, 1) for x in columns))
        optimizers = [script.make_optimizer(player, args) for player in (leader, follower)]
        info = script.update(leader, follower, *optimizers, batch, args)
        assert info["leader/perception_cost"] == pytest.approx(10)


def test_overlay_lands_where_the_attention_is():
    """A one-hot map colours the pixels at the centre of that location's receptive field, no others."""
    leader = sprig.Leader(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), sprig.Args(attention="none"))
    for layer, (size, location) in enumerate([(20, (3, 17)), (9, (8, 1)), (7, (0, 5))]):
        received = np.zeros(size * size)
        received[location[0] * size + location[1]] = size * size
        picture = sprig.attention_overlay(np.full((84, 84), 100, np.uint8), received, *leader.locations[layer])
        coloured = np.argwhere(picture[..., 0] != picture[..., 1])
        # what that location of the convolutional map really depends on, by its gradient
        pixels = torch.zeros(1, 4, 84, 84, requires_grad=True)
        x = pixels
        for conv in leader.convs[: layer + 1]:
            x = conv(x)
        x[0, :, location[0], location[1]].sum().backward()
        field = np.argwhere(pixels.grad[0].abs().sum(0).numpy() > 0)
        np.testing.assert_allclose(coloured.mean(0), field.mean(0), atol=0.01)
        assert coloured.min() >= field.min() and coloured.max() <= field.max()
