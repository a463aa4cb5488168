"""The scripts on a GPU. What needs one is skipped where there is none; the rest is shown on PyTorch's "meta" device."""

import contextlib
import dataclasses
import functools
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, TWINS, build, plain_attention, random_batch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = {"total_timesteps": 128, "num_envs": 2, "num_steps": 32, "minibatch_size": 32, "eval_episodes": 1}
SMALL |= {"max_episode_steps": 40, "threads": 1}
SCRIPTS = {**TWINS, **CONTINUOUS}


@needs_gpu
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"matmul_precision": "bfloat16"}], ids=str)
def test_trains_resumes_and_is_evaluated_on_the_cpu(name, changes, tmp_path):
    if name in CONTINUOUS and "matmul_precision" in changes:
        pytest.skip("the vector scripts have no such precision")
    script, run = SCRIPTS[name], tmp_path / "run"
    family = {"env_id": "Pendulum-v1"} if name in CONTINUOUS else {}
    args = script.Args(run_dir=str(run), device="cuda", **SMALL, **family, **changes)
    script.main(args)
    script.main(dataclasses.replace(args, resume=str(run), run_dir=str(run), total_timesteps=192))
    evaluation = script.main(dataclasses.replace(script.read_args(run), evaluate=str(run), device="cpu"))
    assert np.isfinite(evaluation["returns"]).all()
    assert json.loads((run / "args.json").read_text())["arguments"]["device"] == "cuda"


def build_on(device, script, args):
    """Players, optimizers and a minibatch on a device, as in training."""
    leader, follower, *_ = build(script, args)
    batch = random_batch(script, leader, follower, 64)
    leader, follower = leader.to(device), follower.to(device)
    if device == "meta":  # fused Adam knows no such device
        optimizers = [torch.optim.SGD(script.one_vector(player)) for player in (leader, follower)]
    else:
        optimizers = [script.make_optimizer(player, args) for player in (leader, follower)]
    return leader, follower, *optimizers, script.Batch(*(column.to(device) for column in batch))


def step_of(script, args):
    kind = getattr(args, "update", "joint")
    return getattr(script, f"{kind}_step", None) or script.simultaneous_step


CASES = [{"update": kind} for kind in ("stackelberg", "simultaneous", "stopped", "joint")] + [{"attention": "none"}]


def known(script, settings):
    """Those that the script has: the baseline is one of the cases itself."""
    return {name: value for name, value in settings.items() if hasattr(script.Args, name)}


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_no_gradient_step_asks_the_device_for_a_number(script, settings, monkeypatch):
    """A tensor on "meta" has no values: whatever would wait for them raises. Mixed devices raise as well."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    args = script.Args(**known(script, settings))
    *players, batch = build_on("meta", script, args)
    minibatch = script.select_minibatch(batch, torch.arange(64, device="meta"), args)
    info = step_of(script, args)(*players, minibatch, args)
    assert {value.device.type for value in info.values()} == {"meta"}


GRAPHS = {"joint": 1, "simultaneous": 1, "stackelberg": 2}
STEPS = [("ppo_atari_baseline", "joint"), ("ppo_continuous_baseline", "joint")]
STEPS += [(name, kind) for name in ("sprig_atari", "sprig_continuous") for kind in ("stackelberg", "simultaneous")]


@pytest.mark.parametrize("name, kind", STEPS)
def test_compile_cuts_a_step_only_where_players_descend(name, kind, monkeypatch):
    """The graphs are traced and run as they are, and fit every learning rate.

    On frames with the plain product for attention, which can be traced like a GPU's kernel, and unlike the CPU's tiles.
    """
    script = SCRIPTS[name]
    script.prepare_compiler(torch.device("cpu"))
    args = script.Args(**known(script, {"update": kind}), compile=True)
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this PyTorch cuts at each derivative, too")
    if name == "sprig_atari":
        monkeypatch.setattr(script, "attend", plain_attention)
    if name in TWINS:
        leader, follower, *optimizers = build(script, args)
        batch = random_batch(script, leader, follower, 8)
    else:
        leader = script.Leader(gym.spaces.Box(-np.inf, np.inf, (5,)), args)
        follower = script.Follower(leader.num_features, gym.spaces.Box(-1, 1, (2,)))
        optimizers = [script.make_optimizer(player, args) for player in (leader, follower)]
        batch = script.Batch(torch.randn(8, 5), torch.randn(8, 2), *torch.randn(4, 8))
    torch._dynamo.utils.counters.clear()
    torch.distributions.kl._KL_MEMOIZE.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for rate in (3e-4, 2e-4, 1e-4):  # the first traces, the others must fit
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        script.update(leader, follower, *optimizers, batch, args)
    cuts = {reason.splitlines()[0] for reason in torch._dynamo.utils.counters["graph_break"]}
    assert cuts == {"Skip calling `torch.compiler.disable()`d function"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= GRAPHS[kind]


@pytest.mark.parametrize("name", SCRIPTS)
def test_actions_are_drawn_as_the_distribution_draws_them(name):
    script = SCRIPTS[name]
    for shape in [(500, 6)] + [(500, 2, 3)] * (name in CONTINUOUS):  # logits; mean and log standard deviation
        logits = 2 * torch.randn(shape)
        policy = script.action_distribution(logits)
        torch.manual_seed(3)
        expected, random_state = policy.sample(), torch.get_rng_state()
        torch.manual_seed(3)
        assert torch.equal(script.sample(policy), expected)
        assert torch.equal(torch.get_rng_state(), random_state)


@needs_gpu
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_no_gradient_step_waits_for_the_gpu(script, settings):
    args = script.Args(**known(script, settings))
    *players, batch = build_on("cuda", script, args)
    step = step_of(script, args)
    step(*players, batch, args)  # the first one prepares kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*players, script.select_minibatch(batch, torch.arange(64, device="cuda"), args), args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("leader_gradient", ["first-order", "unrolled", "implicit"])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(leader_gradient):
    """All rows are paid for, since the devices would draw others."""
    script = TWINS["sprig_atari"]
    args = script.Args(leader_gradient=leader_gradient, cost_rows=0, implicit_damping=500.0)
    script.set_matmul_precision("highest")  # no TF32, in convolutions neither
    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        leader, follower, *optimizers, batch = build_on(device, script, args)
        script.stackelberg_step(leader, follower, *optimizers, batch, args)
        ends.append(
            torch.cat([p.detach().cpu().flatten() for player in (leader, follower) for p in player.parameters()])
        )
    torch.testing.assert_close(*ends, atol=2.5e-4, rtol=0)  # Adam's first step is ± the step size, 1e-4
    assert (ends[0] - ends[1]).abs().mean() < 1e-5
