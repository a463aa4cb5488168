"""What the tests share. Every script is imported, never copied from."""

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: the cores are taken
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))  # patch_task.py

import numpy as np
import pytest
import torch

import ppo_atari_baseline
import ppo_continuous_baseline
import sprig_atari
import sprig_continuous

ROOT = Path(__file__).parent.parent
TWINS = {"ppo_atari_baseline": ppo_atari_baseline, "sprig_atari": sprig_atari}
CONTINUOUS = {"ppo_continuous_baseline": ppo_continuous_baseline, "sprig_continuous": sprig_continuous}
# What holds for any script is tested on forks as well: FORKS="my_sprig my_atari" pytest -k my_
forks = [name.removesuffix(".py") for name in os.environ.get("FORKS", "").replace(",", " ").split()]
FORKS = {name: importlib.import_module(name) for name in forks}
ATARI = TWINS | {name: fork for name, fork in FORKS.items() if "ale-py" in fork.SIMULATORS}
VECTORS = CONTINUOUS | {name: fork for name, fork in FORKS.items() if name not in ATARI}


@pytest.fixture(params=ATARI.values(), ids=ATARI.keys())
def script(request):
    """Each of the twins in turn."""
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.set_float32_matmul_precision("highest")  # main sets it for the whole process
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - stable-baselines3 draws from it


def build(script, args, num_actions=9):
    """Leader, follower and their optimizers as main builds them, without an emulator."""
    import gymnasium as gym

    leader = script.Leader(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), args)
    follower = script.Follower(leader.num_features, gym.spaces.Discrete(num_actions))
    return leader, follower, script.make_optimizer(leader, args), script.make_optimizer(follower, args)


def last_gradients(optimizer, module):
    """Of each parameter, as the optimizer's last step took it."""
    (vector,) = optimizer.param_groups[0]["params"]
    parameters = list(module.parameters())
    return [g.view_as(p) for g, p in zip(vector.grad.split([p.numel() for p in parameters]), parameters)]


def random_batch(script, leader, follower, size=32):
    """Noise frames with actions of the current policy, so that all ratios start at 1."""
    obs = torch.randint(0, 256, (size, 84, 84, 4), dtype=torch.uint8).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits, values = follower(leader(obs))
        policy = script.action_distribution(logits)
        actions = policy.sample()
    returns = values + torch.randn(size)
    return script.Batch(obs, actions, policy.log_prob(actions), values, torch.randn(size), returns)


def plain_attention(query, key, value):
    """What `attend` computes, without its fast kernels."""
    return torch.bmm(sprig_atari.attention_rows(query, key), value)
