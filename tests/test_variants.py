"""The study of variants: whom each moves, and when; what it computes."""

import dataclasses

import minatar_variants as variants
import pytest
import torch
from torch.nn.utils import parameters_to_vector

import sprig_atari as base

TINY = {"env_id": "MinAtar/Breakout-v1", "num_envs": 2, "num_steps": 32, "minibatch_size": 16, "update_epochs": 2}
TINY |= {"total_timesteps": 128, "threads": 1, "eval_episodes": 1, "max_episode_steps": 30, "max_grad_norm": 0.05}


def play(update, args):
    """A rollout, an update. Returns who moved at each step, "L", "F" or "LF", and both players' parameters after it."""
    players = dict(zip("LF", base.make_agent(args, "cpu")))
    optimizer = torch.optim.Adam([{"params": p.parameters()} for p in players.values()], 1e-3, eps=1e-5, fused=True)
    envs, obs = base.begin_games(args, 0)
    batch = base.collect_rollout(envs, obs, *players.values(), args)[0]
    moves, seen = [], {n: parameters_to_vector(p.parameters()) for n, p in players.items()}

    def look(*_):
        now = {n: parameters_to_vector(p.parameters()) for n, p in players.items()}
        moves.append("".join(n for n in now if not now[n].equal(seen[n])))
        seen.update(now)

    optimizer.register_step_post_hook(look)
    update(*players.values(), optimizer, batch, args)
    return moves, torch.cat([*seen.values()])


@pytest.mark.parametrize("flags, moves", [  # 4 minibatches, 2 epochs
    ({"variant": "joint", "clip_each": True, "steps_per_minibatch": 2}, ["LF"] * 16),
    ({"variant": "joint", "encoder_epochs": 1}, ["LF"] * 4 + ["F"] * 4),
    ({"variant": "stackelberg", "leader_ent_coef": 0.01}, ["L", "F"] * 8),
    ({"variant": "encoder-first", "value_error": "variance"}, ["L", "F"] * 8),
    ({"variant": "heads-first"}, ["F", "L"] * 8),
    ({"variant": "commit", "leader_epochs": 2, "leader_max_kl": 10.0}, ["L"] * 8 + ["F"] * 8),
    ({"variant": "commit", "leader_epochs": 2, "leader_max_kl": 1e-12}, ["L"] + ["F"] * 8),  # seen after a step
    ({"update": "commit", "leader_max_kl": 1e-12}, ["L"] + ["F"] * 8),
    ({"variant": "value-phase", "phase_interval": 1}, ["L", "F"] * 8 + ["L"] * 12),
    ({"variant": "ppg", "phase_interval": 1}, ["LF"] * 20),
    ({"variant": "fisher"}, ["L", "F"] * 8),
    ({"variant": "frozen"}, ["F"] * 8),
])  # fmt: skip
def test_each_variant_moves_whom_it_should_when_it_should(flags, moves):
    script = variants if "variant" in flags else base
    assert play(script.update, script.Args(**TINY, **flags))[0] == moves


@pytest.mark.parametrize("variant", ["joint", "stackelberg", "commit"])
def test_without_changes_it_is_the_base(variant):
    settings = TINY | {"cost_rows": 0, "leader_value_coef": 0.3}
    _, wanted = play(base.update, base.Args(**settings, update=variant))
    args = variants.Args(**settings, variant=variant)
    changed = dataclasses.replace(args, leader_ent_coef=0.1, clip_each=True, vf_coef=0.1)
    same, other = ((wanted - play(variants.update, x)[1]).abs().max() for x in (args, changed))
    assert same <= (0 if variant == "stackelberg" else 1e-6) < 1e-5 < other


def test_a_phase_whose_rollouts_are_lost_is_not_resumed(tmp_path, monkeypatch):
    for name in ("Args", "update", "__file__"):
        monkeypatch.setattr(base, name, getattr(base, name))  # main replaces them
    variants.main(args := variants.Args(**TINY, variant="ppg", phase_interval=3, run_dir=str(tmp_path / "run")))
    with pytest.raises(SystemExit, match="run holds no rollouts gathered for the next phase; begin ppg anew"):
        variants.main(dataclasses.replace(args, resume=tmp_path / "run", total_timesteps=192))


def test_full_loss_is_ppos_and_the_variance_forgives_a_constant_error():
    logits, returns = torch.randn(16, 6), torch.randn(16)
    batch = base.Batch(None, torch.randint(6, (16,)), torch.randn(16) - 1.8, returns, torch.randn(16), returns)
    args, values, cost = variants.full_loss(variants.Args(leader_rate_factor=3)), torch.randn(16), torch.ones(16)
    ppo = base.follower_loss(logits, values, batch, args)[0]
    assert variants.leader_loss(logits, values, cost, batch, args)[0].item() == pytest.approx(ppo.item(), abs=1e-6)
    args.value_error = "variance"
    assert torch.isclose(*(variants.leader_loss(logits, returns + k, cost, batch, args)[0] for k in (0, 3)), atol=1e-5)


def test_fishers_gradient_is_that_of_dense_matrices():
    args, obs, returns = variants.Args(leader_value_coef=0.3), torch.randn(16, 3), torch.randn(16)
    batch = base.Batch(obs, torch.randint(4, (16,)), torch.full((16,), -1.4), returns, torch.randn(16), returns)
    leader, heads = torch.nn.Linear(3, 2), torch.nn.Linear(2, 5)  # 4 logits, a value
    theta, phi = [*leader.parameters()], [*heads.parameters()]
    logits, values = heads(leader(obs)).split([4, 1], -1)
    loss, _ = variants.leader_loss(logits, values[:, 0], torch.zeros(16), batch, args)
    scores = [(x.exp().detach(), variants.gradient(x, phi)) for x in logits.log_softmax(-1).flatten()]
    fisher = sum(probability * torch.outer(score, score) for probability, score in scores) / 16
    slope = variants.gradient(base.follower_loss(logits, values[:, 0], batch, args)[0], phi, create_graph=True)
    mixed = torch.stack([variants.gradient(x, theta) for x in slope], 1)  # M
    correction = mixed @ torch.linalg.solve(fisher + 0.01 * torch.eye(15), variants.gradient(loss, phi))
    direct = variants.gradient(loss, theta)
    total, scale = variants.anticipate(leader, heads, loss, logits, values[:, 0], batch, args, damping=0.01)
    assert scale.item() == pytest.approx((direct.norm() / correction.norm()).item(), rel=1e-2) and scale < 1
    torch.testing.assert_close(variants.gradient(total, theta), direct - scale * correction, rtol=1e-2, atol=1e-4)
