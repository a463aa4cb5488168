"""SPRIG's game: who moves, by which loss, and what attention costs."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import sprig_atari as sprig
import sprig_continuous

BOTH = pytest.mark.parametrize("script", [sprig, sprig_continuous], ids=lambda script: script.__name__)


def build(script, args, size=10, num_actions=6):
    """Leader and follower on square frames; 10x10 makes the small convolutions, 84x84 the Nature CNN's."""
    leader = script.Leader(gym.spaces.Box(0, 255, (4, size, size), np.uint8), args)
    for block in getattr(leader, "blocks", ()):
        if getattr(block, "gate", None) is not None:
            torch.nn.init.constant_(block.gate, 0.5)  # at its first value, 0, attention would not matter
    follower = script.Follower(leader.num_features, gym.spaces.Discrete(num_actions))
    torch.nn.init.orthogonal_(follower.actor.weight)  # at its first size, 0.01, little of the policy reaches the leader
    return leader, follower


def in_double(leader, follower, batch):
    """In which a sum's order does not show."""
    columns = (x.double() if x.is_floating_point() or x.dtype == torch.uint8 else x for x in batch)
    return leader.double(), follower.double(), batch._replace(**dict(zip(batch._fields, columns)))


def adam(script, leader, follower, args, **options):
    factor = getattr(args, "leader_rate_factor", 1.0)
    groups = [{"params": leader.parameters(), "lr": factor * args.learning_rate}, {"params": follower.parameters()}]
    return torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5, **{"fused": True, **options})


def random_batch(script, leader, follower, size=16, frame=10):
    """Noise frames with actions of the current policy, from which the ratios are a little away."""
    obs = torch.randint(0, 256, (size, 4, frame, frame), dtype=torch.uint8)
    with torch.no_grad():
        logits, values = follower(leader(obs))
    policy = script.action_distribution(logits)
    actions = policy.sample()
    logprobs = policy.log_prob(actions) + 0.2 * torch.randn(size)
    return script.Batch(obs, actions, logprobs, values, torch.randn(size), values + torch.randn(size))


def clones(*modules):
    return [[p.detach().clone() for p in module.parameters()] for module in modules]


# ==== Moves =======================================================================================
def move_by_hand(leader, follower, optimizer, batch, args):
    """Each --update written out from its definition; only the losses are the script's."""
    theta, phi = list(leader.parameters()), list(follower.parameters())

    def ppo_loss(features, let_value_through=True):
        logits, values = follower(features)
        return sprig.follower_loss(logits, values if let_value_through else values.detach(), batch, args)[0]

    def own_loss():
        features, attention = leader(batch.obs, num_rows=0)
        cost = sprig.perception_cost(attention, args.perception_cost)
        return sprig.leader_loss(*follower(features), cost, batch, args)[0]

    if args.update in ("stackelberg", "simultaneous"):
        own_loss().backward(inputs=theta)
    else:
        ppo_loss(leader(batch.obs), args.update == "joint").backward(inputs=theta)
    if args.update == "stackelberg":
        clip_grad_norm_(theta, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    ppo_loss(leader(batch.obs).detach()).backward(inputs=phi)
    for norm_of in [theta + phi] if args.update in ("joint", "stopped") else [theta, phi]:
        clip_grad_norm_(norm_of, args.max_grad_norm)
    optimizer.step()


RUNGS = ["joint", "stopped", "separate", "simultaneous", "stackelberg"]
SETTINGS = [
    *({"update": update} for update in RUNGS),
    *({"update": update, "max_grad_norm": 1e9} for update in RUNGS),
    *({"update": update, "leader_value_coef": 0.5, "max_grad_norm": 1e9} for update in RUNGS[3:]),
    {"leader_objective": "log-prob", "max_grad_norm": 1e9},
    {"cooperation_weight": 0.1, "perception_cost_weight": 5.0, "perception_cost": "concentration"},
    {"attention": "none"},
    {"paper_literal": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_is_what_its_update_means(settings):
    """With plain descent, which shows gradients as they are, and where a small norm clip binds, its effect."""
    args = sprig.Args(**{"cost_rows": 0, "max_grad_norm": 0.05, "perception_cost_weight": 0.5, **settings})
    leader, follower = build(sprig, args)
    leader, follower, batch = in_double(leader, follower, random_batch(sprig, leader, follower))
    start, ends = clones(leader, follower), []
    for step in (sprig.stackelberg_step, move_by_hand):
        players = copy.deepcopy((leader, follower))
        step(*players, torch.optim.SGD([p for player in players for p in player.parameters()], lr=0.5), batch, args)
        ends.append(clones(*players))
    for before, one, other in zip(start, *ends):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        assert max((a - b).abs().max() for a, b in zip(one, before)) > 1e-6, "nothing was moved"


@pytest.mark.parametrize("method", ["first-order", "unrolled", "implicit"])
def test_frozen_parameters_stay_and_fused_adam_reads_each_gradient_in_its_own_layout(method):
    """Those of channels-last convolutions, assigned by hand, it would silently misread."""
    args, ends = sprig.Args(leader_gradient=method, cost_rows=0, max_grad_norm=1e3), []
    leader, follower = build(sprig, args)
    for frozen in (leader.convs[1].weight, follower.hidden.bias):
        frozen.requires_grad_(False)
    batch = random_batch(sprig, leader, follower)
    for fused in (True, False):
        players = copy.deepcopy((leader, follower))
        sprig.stackelberg_step(*players, adam(sprig, *players, args, fused=fused), batch, args)
        ends.append(clones(players[0])[0])
        for player, before in zip(players, (leader, follower)):
            for p, old in zip(player.parameters(), before.parameters()):
                assert torch.equal(p, old) != p.requires_grad
    torch.testing.assert_close(*ends, atol=1e-5, rtol=0)  # the step is ± 1e-4


def test_update_stops_at_a_large_kl_between_epochs_and_at_what_is_not_finite(script):
    args = script.Args(minibatch_size=8, update_epochs=50, learning_rate=1e-3, target_kl=0.05)
    leader, follower = build(script, args)
    batch, optimizer = random_batch(script, leader, follower), adam(script, leader, follower, args)
    info = script.update(leader, follower, optimizer, batch, args)
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert max(steps) < 100 and max(steps) % 2 == 0 and all(np.isfinite(list(info.values())))
    broken = batch._replace(advantages=batch.advantages.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(FloatingPointError, match="is not finite"):  # which clipping the norm lets pass
        script.update(leader, follower, optimizer, broken, args)


# ==== Losses ======================================================================================
@pytest.mark.parametrize("clip_value_loss", [False, True])
def test_losses_are_those_of_the_paper(script, clip_value_loss):
    """Eq. 8 and lines 10, 14-17, number by number."""
    settings = {"clip_coef": 0.1, "vf_coef": 0.7, "ent_coef": 0.3, "clip_value_loss": clip_value_loss}
    rng, size = np.random.default_rng(0), 64
    returns, values, old_values, advantages = rng.normal(size=(4, size))
    logits, actions = rng.normal(size=(size, 5)), rng.integers(5, size=size)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    taken = p[np.arange(size), actions]
    ratio = np.exp(rng.normal(0, 0.2, size))
    clipped = np.minimum(ratio * advantages, np.clip(ratio, 0.9, 1.1) * advantages).mean()
    error = (values - returns) ** 2
    if clip_value_loss:  # the larger of two errors, as OpenAI's baselines have it
        error = np.maximum(error, (old_values + np.clip(values - old_values, -0.1, 0.1) - returns) ** 2)
    entropy = -(p * np.log(p)).sum(1).mean()
    columns = (actions, np.log(taken / ratio), old_values, advantages, returns)
    batch = script.Batch(None, *(torch.from_numpy(x) for x in columns))
    logits, tensors = torch.from_numpy(logits), torch.from_numpy(values)
    loss, info = script.follower_loss(logits, tensors, batch, script.Args(**settings))
    assert loss.item() == pytest.approx(-clipped + 0.7 * error.mean() - 0.3 * entropy, rel=1e-6)  # line 17
    assert info["losses/clipfrac"].item() == pytest.approx((abs(ratio - 1) > 0.1).mean())
    assert info["losses/approx_kl"].item() == pytest.approx((ratio - 1 - np.log(ratio)).mean())
    if not hasattr(script, "leader_loss"):
        return
    cost = torch.from_numpy(rng.random(size))
    for objective, gain in (("clipped", clipped), ("log-prob", (np.log(taken) * advantages).mean())):
        utility = 0.8 * gain - 0.2 * 0.3 * cost.mean().item()  # Eq. 8, 9
        game = {"cooperation_weight": 0.8, "perception_cost_weight": 0.3, "leader_objective": objective}
        for coef in (0.0, 0.4):
            args = script.Args(**settings, **game, leader_value_coef=coef)
            loss, info = script.leader_loss(logits, tensors, cost, batch, args)
            assert info["leader/utility"].item() == pytest.approx(utility, rel=1e-6)
            assert loss.item() == pytest.approx(-utility + coef * ((values - returns) ** 2).mean(), rel=1e-6)


def test_the_paper_as_printed_is_one_flag_and_no_contradiction():
    args = sprig.Args(paper_literal=True)
    assert args.cooperation_weight == 0.3 and args.perception_cost == "l1" and args.attention == "figure4"
    assert args.leader_objective == "log-prob" and args.update == "stackelberg" and args.feature_scale == 1
    with pytest.raises(ValueError, match="--paper-literal sets --attention figure4"):
        sprig.Args(paper_literal=True, attention="none")


# ==== Perception cost =============================================================================
COSTS = {"entropy": (1, 0, 0), "concentration": (0, 1, 0), "l1": (1, 1, 1)}


@pytest.mark.parametrize("kind", COSTS)
def test_costs_are_known_and_lie_between_0_and_1_and_only_l1_has_no_gradient(kind):
    """Known: all rows uniform, all look at location 0, each looks at a location of its own."""
    known = [(torch.full((n, n), 1 / n), F.one_hot(torch.zeros(n).long(), n), torch.eye(n)) for n in (400, 81, 49)]
    for attention, expected in zip(zip(*known), COSTS[kind]):
        cost = sprig.perception_cost([x.float().expand(2, -1, -1) for x in attention], kind)
        torch.testing.assert_close(cost, torch.full((2,), float(expected)), atol=1e-5, rtol=0)
    assert sprig.perception_cost([], kind) == 0
    for scale in (0.0, 1.0, 30.0):
        scores = (scale * torch.randn(4, 49, 49)).requires_grad_()
        cost = sprig.perception_cost([scores.softmax(-1)], kind)
        assert (cost >= 0).all() and (cost <= 1).all()
        (gradient,) = torch.autograd.grad(cost.sum(), scores)
        assert gradient.isfinite().all() and (kind != "l1" or not gradient.any())
        assert scale != 1 or (gradient.abs().max() > 1e-6) == (kind != "l1")


def test_entropy_of_sampled_rows_is_unbiased():
    block = sprig.AttentionBlock(32, gated=True)
    torch.nn.init.normal_(block.project.weight, std=1.0)  # rows that differ in entropy
    x = torch.randn(2, 100, 32)
    with torch.no_grad():
        exact = sprig.perception_cost([block(x, num_rows=0)[1]], "entropy")
        draws = torch.stack([sprig.perception_cost([block(x, num_rows=24)[1]], "entropy") for _ in range(400)])
    error = draws.std(0) / 400**0.5
    assert (error > 0).all(), "the draws must differ"
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()


def test_what_a_cost_cannot_be_computed_from_is_refused_or_not_drawn():
    args = sprig.Args(perception_cost="concentration", cost_rows=3)
    leader, follower = build(sprig, args)
    obs = random_batch(sprig, leader, follower).obs
    expected = sprig.perception_cost(leader(obs, num_rows=0)[1], "concentration")
    torch.testing.assert_close(sprig.perceive(leader, obs, args)[1], expected)
    with pytest.raises(ValueError, match="all 49 query rows"):
        sprig.perception_cost([torch.full((1, 5, 49), 1 / 49)], "concentration")
    with pytest.raises(ValueError, match="unknown perception cost 'l2'"):
        sprig.perception_cost([torch.eye(4)[None]], "l2")


@BOTH
def test_perception_cost_in_reward_is_subtracted(script):
    """With γ = 0 returns are the learner's rewards: R - λ_c·C_θ(s), Eq. (13)."""
    env_id = {"env_id": "MinAtar/Breakout-v1"} if script is sprig else {"env_id": "CartPole-v1"}
    settings = {"num_envs": 2, "num_steps": 16, "minibatch_size": 32, "gamma": 0.0, "norm_adv": "none", "cost_rows": 0}
    batches = []
    for paid in (False, True):
        args = script.Args(**env_id, **settings, perception_cost_weight=0.1, perception_cost_in_reward=paid)
        leader, follower = script.make_agent(args, "cpu")
        envs, obs = script.begin_games(args, 0, 0)
        batches.append(script.collect_rollout(envs, obs, leader, follower, args)[0])
        envs.close()
    free, paid = batches
    assert torch.equal(free.actions, paid.actions)
    cost = script.perception_cost(leader(paid.obs, num_rows=0)[1], "entropy")
    assert cost.std() > 0
    torch.testing.assert_close(free.returns - paid.returns, 0.1 * cost.detach(), atol=1e-6, rtol=1e-4)


# ==== Attention ===================================================================================
@pytest.mark.parametrize(("size", "locations"), [(84, (400, 81, 49)), (10, (64, 36, 16)), (126, (900, 196, 144))])
@pytest.mark.parametrize("attention", ["gated", "figure4", "none"])
def test_every_kind_of_attention_on_every_size_of_frame(attention, size, locations):
    leader, _ = build(sprig, sprig.Args(attention=attention), size)
    obs = torch.randint(256, (2, 4, size, size), dtype=torch.uint8)
    features, maps = leader(obs, num_rows=0)
    assert features.shape == (2, leader.num_features) == (2, locations[-1] * (32 if size == 10 else 64))
    torch.testing.assert_close(leader(obs.float()), features)  # frames of a fork's environment
    assert [tuple(m.shape) for m in maps] == ([] if attention == "none" else [(2, n, n) for n in locations])
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    info, picture = leader.look(obs)
    assert picture.shape == (2 * size, size * (1 + len(maps))) and 0 <= picture.min() <= picture.max() <= 1
    assert ("leader/blocks.2.gate" in info) == (attention == "gated")
    assert ("leader/attention_entropy_3" in info) == (attention != "none")
    if maps:  # the middle of each location's square shows what it receives; white is twice the uniform share
        side = round(locations[-1] ** 0.5)
        middle = ((torch.arange(side) + 0.5) * size / side).long()
        received = (maps[-1].sum(1).view(2, side, side) / 2).clamp(0, 1)
        torch.testing.assert_close(picture.view(2, size, -1, size)[:, middle, -1][..., middle], received)


@BOTH
def test_a_block_is_scaled_dot_product_attention(script):
    torch.manual_seed(1)
    block, gated = script.AttentionBlock(32, gated=False), script.AttentionBlock(32, gated=True)
    torch.nn.init.normal_(block.project.weight, std=0.3)
    gated.load_state_dict(block.state_dict() | {"gate": torch.tensor(0.3)})
    x = torch.randn(3, 36, 32)
    with torch.no_grad():
        (output, weights), (_, rows) = block(x, num_rows=0), block(x, num_rows=7)
        reference = F.scaled_dot_product_attention(*block.project(x).split(block.widths, -1))
        torch.testing.assert_close(output, reference, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gated(x)[0], x + 0.3 * output)
    drawn = (rows[0][:, None] - weights[0]).abs().sum(-1).argmin(1)  # which rows they are; the same for the whole batch
    assert len(drawn.unique()) == 7
    torch.testing.assert_close(rows, weights[:, drawn])


def test_gates_start_at_zero_and_attention_then_changes_nothing():
    space = gym.spaces.Box(0, 255, (4, 10, 10), np.uint8)
    gated, plain = (sprig.Leader(space, sprig.Args(attention=kind)) for kind in ("gated", "none"))
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("blocks")})
    obs = torch.randint(0, 256, (2, 4, 10, 10), dtype=torch.uint8)
    assert torch.equal(gated(obs), plain(obs))


@torch.no_grad()
def test_features_know_where_things_are_unless_read_literally():
    """Row 4 of docs/paper.md: the spatial standard deviation of the final features, on frames of BeamRider."""
    envs, _ = sprig.begin_games(sprig.Args(num_envs=4, threads=1), 0, 0)
    for t in range(60):
        obs, *_ = envs.step(np.arange(t, t + 4) % 9)
    envs.close()
    for args in (sprig.Args(feature_scale=1.0), sprig.Args(paper_literal=True)):
        features = sprig.Leader(envs.single_observation_space, args)(torch.from_numpy(obs))
        spread = features.view(4, 64, 49).std(-1).mean()
        assert spread < 0.01 if args.paper_literal else spread > 0.1
