"""The scripts on a GPU; skipped where there is none. CPU and GPU draw different numbers: runs differ, steps agree."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, TWINS
from test_game import adam, build, random_batch

import sprig_atari as sprig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RUN = {"total_timesteps": 128, "num_envs": 2, "num_steps": 32, "minibatch_size": 32, "eval_episodes": 1, "threads": 1}


@pytest.mark.parametrize("name", [*TWINS, *CONTINUOUS])
def test_trains_resumes_and_is_evaluated_on_the_cpu(name, tmp_path):
    script, run = (TWINS | CONTINUOUS)[name], str(tmp_path / "run")
    env_id = "Pendulum-v1" if name in CONTINUOUS else "MinAtar/Breakout-v1"
    args = script.Args(run_dir=run, device="cuda", env_id=env_id, max_episode_steps=40, anneal_lr=False, **RUN)
    script.main(args)
    script.main(dataclasses.replace(args, resume=run, total_timesteps=192))
    evaluation = script.main(dataclasses.replace(args, evaluate=run, device="cpu"))
    assert np.isfinite(evaluation["returns"]).all()


@pytest.mark.parametrize("method", ["first-order", "unrolled", "implicit"])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(method, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    args, ends = sprig.Args(leader_gradient=method, cost_rows=0), []  # all rows: the devices would draw others
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        leader, follower = build(sprig, args, size=84)
        batch = sprig.Batch(*(x.to(device) for x in random_batch(sprig, leader, follower, 64, frame=84)))
        leader, follower = leader.to(device), follower.to(device)
        sprig.stackelberg_step(leader, follower, adam(sprig, leader, follower, args), batch, args)
        ends.append(torch.cat([p.detach().cpu().flatten() for p in (*leader.parameters(), *follower.parameters())]))
    torch.testing.assert_close(*ends, atol=2.5e-4, rtol=0)  # Adam's first step is ± 1e-4
    assert (ends[0] - ends[1]).abs().mean() < 1e-5
