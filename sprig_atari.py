# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "ale-py==0.12.1",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "numpy==2.4.6",
# ]
# ///
"""SPRIG on Atari pixels: perception leads, policy follows, in a cooperative Stackelberg game.

    python sprig_atari.py --env-id BeamRiderNoFrameskip-v4

Paper: Martinez-Lopez, Chen, Lu, "SPRIG: Stackelberg Perception-Reinforcement Learning with
Internal Game Dynamics", arXiv 2502.14264. Equation and line numbers below are the paper's (lines:
Algorithm 1); DEVIATION marks each place where this code does not do what is printed there, with
its row in docs/paper.md. `--paper-literal` runs the paper as printed.

Measured so far (BeamRiderNoFrameskip-v4, AMD EPYC CPU, torch 2.13.0, ale-py 0.12.1; 30 games each): 530 points
after 1.0M agent steps (mean of seeds 1 to 5; 493 to 577), where a random agent scores 361; README compares.

Changes relative to ppo_atari_baseline.py: the leader has LayerNorm, attention and a feature scale,
pays for its attention, and moves first on a utility of its own; the follower then takes PPO's step
on features that it cannot change. Everything else is the same code.

Read first: Args, Leader, AttentionBlock, Follower, the losses, update and stackelberg_step (some 400 lines). Then
collect_rollout, compute_gae and leader_gradient. The rest is machinery: fast attention, logging, checkpoints and, at
the end, the checks of arguments and the set-up of the process.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
import warnings
import zipfile
from collections import deque
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

if __name__ == "__main__":  # OpenMP reads it when torch is loaded: idle threads soon stop spinning and free their cores
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch.distributed.nn.functional import all_reduce
from torch.distributions import Categorical, Distribution, kl_divergence
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)


# ==================================================================================================
# Arguments
# ==================================================================================================
@dataclass
class Args:
    # -- Run --
    seed: int = 1
    """seed of the networks, the actions, the minibatches and the games"""
    total_timesteps: int = 10_000_000
    """agent steps in all, over all environments; rounded down to whole rollouts"""
    run_dir: str = ""
    """folder of the run, new or empty (if not given: runs/<env>__<script>__<seed>__<time>)"""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; "auto" takes a CUDA GPU if there is one"""
    threads: int = 0
    """CPU threads of the networks and of the emulator (0: as many as there are cores)"""
    matmul_precision: Literal["highest", "high", "medium", "bfloat16"] = "high"
    """how matrix products round (docs/speed.md). highest: float32; high: TF32 where supported;
    medium: bfloat16 on CPUs with AMX; bfloat16: the encoder under bfloat16 autocast, the rest as high"""
    compile: bool = False
    """torch.compile the policy and the gradient step: a minute at the start; on a CPU it speeds up PPO, not SPRIG"""
    eval_episodes: int = 10
    """whole games played after training, on fresh seeds (0: none)"""
    eval_greedy: bool = False
    """take the most probable action in the evaluation instead of sampling it"""
    checkpoint_interval: int = 500_000
    """agent steps between checkpoints; the games restart at each (0: only the first and last checkpoint)"""
    resume: str = ""
    """folder of a run to continue, with its own arguments"""
    evaluate: str = ""
    """folder of a run to evaluate instead of training"""
    track: bool = False
    """mirror the logs to Weights & Biases (needs `pip install wandb`)"""

    # -- Environment --
    env_id: str = "BeamRiderNoFrameskip-v4"
    """any <Game>NoFrameskip-v4 or ALE/<Game>-v5 (the latter: sticky actions with probability 0.25)"""
    num_envs: int = 8
    """games played side by side, N"""
    max_episode_steps: int = 10_000
    """agent steps (of 4 frames) after which a game is truncated"""
    clip_rewards: bool = True
    """the learner sees sign(reward); logged returns are always raw"""
    observation_noise: float = 0.0
    """robustness: standard deviation of Gaussian noise on each pixel, as a fraction of white"""
    distractors: int = 0
    """robustness: rows of pixels, from the top, replaced by random pixels"""
    reward_delay: int = 1
    """robustness: pay the learner once in this many steps, and when its episode ends"""

    # -- PPO --
    num_steps: int = 256
    """steps of each environment per rollout, T; Table 1's rollout of 2048 is 8 x 256"""
    minibatch_size: int = 64
    """transitions per gradient step, B"""
    update_epochs: int = 4
    """passes over each rollout"""
    learning_rate: float = 1e-4
    """Adam's step size"""
    anneal_lr: bool = False
    """let the step size fall linearly to 0"""
    gamma: float = 0.99
    """discount, γ"""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation"""
    norm_adv: Literal["rollout", "minibatch", "none"] = "rollout"
    """over what the advantages are normalised"""
    clip_coef: float = 0.2
    """ε: the probability ratio is clipped to [1 - ε, 1 + ε]"""
    clip_value_loss: bool = False
    """clip the value's change to ε as well"""
    ent_coef: float = 0.01
    """weight of the entropy bonus, β"""
    vf_coef: float = 0.5
    """weight of the mean squared value error (which has no further factor 1/2)"""
    max_grad_norm: float = 0.5
    """largest gradient norm of a step"""
    target_kl: float | None = None
    """stop a rollout's epochs once the mean approximate KL of one of them exceeds this"""

    # -- SPRIG --
    cooperation_weight: float = 0.7
    """α of Eq. (8): the leader's weight on the return; 1 - α weighs the perception cost"""
    perception_cost_weight: float = 1e-4
    """λ_c of Eq. (9)"""
    perception_cost: Literal["entropy", "concentration", "l1"] = "entropy"
    """what attention costs: spread-out rows, crowded columns, or the printed norm (a constant)"""
    cost_rows: int = 24
    """query rows sampled per layer to estimate entropy or l1 without bias (0: all rows; concentration: always all)"""
    leader_objective: Literal["clipped", "log-prob"] = "clipped"
    """the leader's policy term: PPO's surrogate, or mean(log π · Â) as in line 10"""
    leader_gradient: Literal["first-order", "unrolled", "implicit"] = "first-order"
    """Algorithm 1's partial derivative, or the total one: through steps of the follower, or its best response"""
    unroll_steps: int = 1
    """unrolled: steps of gradient descent that the follower is expected to take"""
    unroll_step_size: float = 0.02
    """unrolled: size of these steps, η"""
    implicit_damping: float = 50.0
    """implicit: λ, added to the curvature of the follower's loss; λ = 1/η resembles one unrolled step of size η"""
    cg_iterations: int = 10
    """implicit: maximum number of conjugate-gradient steps"""
    cg_tolerance: float = 1e-3
    """implicit: the residual, relative to the right-hand side, at which they stop"""
    correction_clamp: float | None = 1.0
    """largest norm of total minus first-order gradient, as a multiple of the first-order one's (None: no bound)"""
    leader_rate_factor: float = 1.0
    """the leader's step size, as a multiple of --learning-rate"""
    leader_value_coef: float = 0.0
    """weight of the squared value error in the leader's loss (Algorithm 1: none)"""
    attention: Literal["gated", "figure4", "none"] = "gated"
    """ReLU and x + γ·attention(x); attention(x) alone as drawn in Figure 4; or no attention"""
    feature_scale: float = 0.15
    """factor on the features that the follower sees: sets how far an Adam step moves the policy"""
    update: Literal["stackelberg", "simultaneous", "separate", "stopped", "joint"] = "stackelberg"
    """who moves when; from PPO to SPRIG each rung adds one change:
    joint: PPO's loss on these networks; stopped: no value gradient to the leader;
    separate: a norm clip for each player; simultaneous: the leader's own loss;
    stackelberg: the leader moves first"""
    perception_cost_in_reward: bool = False
    """learn from R - λ_c·C_θ(s), the reward in Eq. (13)"""
    paper_literal: bool = False
    """the paper as printed: rows 1, 2, 4, 5, 10 and 11 of docs/paper.md"""


# What --paper-literal sets. Any other value of these flags is refused, but for the default, which cannot be told from a
# flag not given; so those that stay at their default stand here too.
PAPER_LITERAL = {
    "cooperation_weight": 0.3,  # line 11 puts its α = 0.7 on the cost, 0.3 on the return
    "perception_cost": "l1",
    "attention": "figure4",
    "feature_scale": 1.0,
    "leader_objective": "log-prob",
    "leader_gradient": "first-order",
    "leader_value_coef": 0.0,
    "update": "stackelberg",
}


# ==================================================================================================
# Environment
# ==================================================================================================
FRAME_SKIP = 4  # emulator frames per agent step
SIMULATORS = ("ale-py",)  # packages whose versions a run records


def env_protocol(args: Args) -> dict:
    """How the game is played, in full: what two results must share to be comparable.

    Ends the run with one line if the id is none that fits. Standard preprocessing: Mnih et al. 2015; its reporting:
    Machado et al. 2018 (arXiv 1709.06009).
    """
    try:
        spec = gym.spec(args.env_id)
    except gym.error.Error as error:  # which suggests a near name
        fail(f"--env-id {args.env_id}: {one_line(error)}")
    if spec.entry_point != "ale_py.env:AtariEnv":
        fail(f"--env-id {args.env_id} is not an Atari game; take e.g. BeamRiderNoFrameskip-v4 or ALE/BeamRider-v5")
    if spec.kwargs["frameskip"] not in (1, FRAME_SKIP):
        fail(f"--env-id {args.env_id} skips a random number of frames; take a NoFrameskip-v4 or ALE/...-v5 id")
    return {
        "env_id": args.env_id,
        "game": spec.kwargs["game"],
        "repeat_action_probability": spec.kwargs["repeat_action_probability"],
        "full_action_space": spec.kwargs["full_action_space"],
        "max_frames_per_game": min(spec.kwargs["max_num_frames_per_episode"], FRAME_SKIP * args.max_episode_steps),
        "frame_skip": FRAME_SKIP,
        "max_pool": True,
        "observation": "84x84 grey, 4 frames stacked",
        "noop_max": 30,  # ale-py draws 0 to 29, one less after FIRE
        "fire_on_reset": True,  # of a game; after a lost life the agent presses FIRE itself
        "lost_life": "ends the learner's episode, not the game",
        "reward": "sign for the learner, raw in logs" if args.clip_rewards else "raw",
        "autoreset": "same step",
        "observation_noise": args.observation_noise,
        "distractors": args.distractors,
        "reward_delay": args.reward_delay,
    }


class WholeGames(gym.vector.VectorWrapper):
    """Adds whole games' results to `info`: `AtariVectorEnv` terminates at each lost life.

    On steps where some game ended (over, or truncated), `info["episode"]` holds its raw return "r"
    and length "l" in agent steps, both (N,), and `info["_episode"]` the rows for which they and
    `info["final_obs"]` are valid (the keys of Gymnasium's RecordEpisodeStatistics).
    """

    def reset(self, *, seed=None, options=None):
        if seed is not None:  # the emulator takes an int or an array
            seed = np.asarray(seed) if np.ndim(seed) else int(seed)
        obs, info = self.env.reset(seed=seed, options=options)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        self.first_frame = info["frame_number"] - info["episode_frame_number"]
        return obs, info

    def step(self, actions):
        actions = np.asarray(actions)
        if actions.min() < 0 or actions.max() >= self.single_action_space.n:  # the emulator would hang
            raise ValueError(f"actions {actions} outside 0..{self.single_action_space.n - 1}")
        obs, rewards, terminations, truncations, info = self.env.step(actions)
        self.returns += rewards
        self.lengths += 1
        # The emulator's frame at which the running game began: another one only if a new game has begun.
        first_frame = info["frame_number"] - info["episode_frame_number"]
        ended = first_frame != self.first_frame  # not at a lost life, after which the same game goes on
        if ended.any():
            info["episode"] = {"r": self.returns.copy(), "l": self.lengths.copy()}
            info["_episode"] = ended
            self.returns[ended], self.lengths[ended] = 0, 0
        self.first_frame = first_frame
        return obs, rewards, terminations, truncations, info


class Disturbed(gym.vector.VectorWrapper):
    """The robustness switches: noise and distractors in what is observed, delay in what is paid.

    Returns in `info["episode"]` stay what they are. The noise starts anew, from the games' seeds, at each reset.
    """

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        super().__init__(envs)
        self.noise, self.distractors = args.observation_noise, args.distractors
        self.delay, self.clip_rewards = args.reward_delay, args.clip_rewards

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        self.random = np.random.default_rng(seed)
        self.unpaid, self.steps = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        return self.disturb(obs), info

    def step(self, actions):
        obs, rewards, terminations, truncations, info = self.env.step(actions)
        if self.delay > 1:
            # Clipped before they are added up: the sign of a sum would not tell how many there were.
            self.unpaid += np.sign(rewards) if self.clip_rewards else rewards
            self.steps += 1
            ended = terminations | truncations
            due = ended | (self.steps % self.delay == 0)
            rewards = np.where(due, self.unpaid, 0)
            self.unpaid[due], self.steps[ended] = 0, 0
        if "final_obs" in info:
            info["final_obs"] = self.disturb(info["final_obs"])
        return self.disturb(obs), rewards, terminations, truncations, info

    def disturb(self, obs: np.ndarray) -> np.ndarray:
        """(N, 4, 84, 84) uint8 -> the same, with what the switches ask for."""
        if self.noise:
            noise = self.random.standard_normal(obs.shape, dtype=np.float32)
            obs = (obs + 255 * self.noise * noise).round().clip(0, 255).astype(np.uint8)
        if self.distractors:
            strip = (*obs.shape[:-2], self.distractors, obs.shape[-1])
            pixels = self.random.integers(256, size=strip, dtype=np.uint8)
            obs = np.concatenate([pixels, obs[..., self.distractors :, :]], axis=-2)
        return obs


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """`args.num_envs` games: obs (N, 4, 84, 84) uint8, rewards (N,) raw, autoreset within the step.

    `terminations` marks lost lives too; `truncations` the games cut at the step limit.
    """
    protocol = env_protocol(args)
    envs = AtariVectorEnv(
        protocol["game"],
        args.num_envs,
        num_threads=min(args.threads, args.num_envs),
        repeat_action_probability=protocol["repeat_action_probability"],
        full_action_space=protocol["full_action_space"],
        max_num_frames_per_episode=protocol["max_frames_per_game"],
        frameskip=protocol["frame_skip"],
        maxpool=protocol["max_pool"],
        noop_max=protocol["noop_max"],
        use_fire_reset=protocol["fire_on_reset"],
        life_loss_info=True,  # episodic_life would restart the whole game at each lost life
        reward_clipping=False,  # on by default; the learner clips, so that logged returns are raw
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    return Disturbed(WholeGames(envs), args)


def env_seeds(seed: int, *stream: int, num_envs: int) -> np.ndarray:
    """(N,) seeds, one per game, hashed: with seed, seed + 1, ... the runs of neighbouring seeds would share games.

    The first number of `stream` says what they are for: 0 training (then the step), 1 evaluation, 2 watch.py, 3
    benchmark/, 4 each process's own draws. Zeros at its end do not count: (2,) and (2, 0) give the same.
    """
    return (np.random.SeedSequence([seed, *stream]).generate_state(num_envs) >> 1).astype(np.int64)  # 31 bits: a C int


def restart(envs: gym.vector.VectorEnv, args: Args, global_step: int) -> np.ndarray:
    """Start this process's games anew, from seeds made of (seed, step), and return their observations."""
    seeds = env_seeds(args.seed, 0, global_step, num_envs=args.num_envs)  # stream 0: training
    rank, num_processes = processes()
    return envs.reset(seed=np.split(seeds, num_processes)[rank])[0]


# ==================================================================================================
# Leader
# ==================================================================================================
class Leader(nn.Module):
    """Perception, θ: three times conv, LayerNorm, attention (Figure 3), at the sizes of the Nature CNN.

    obs (B, 4, 84, 84) uint8 -> features (B, 3136). With `num_rows` given, (features, attention):
    a list of K = 3 tensors (B, r, n) for n = 400, 81, 49 locations (see AttentionBlock).
    """

    locations = ((4, 2), (8, 6), (8, 14))  # by layer: pixels for each location, and margin of the first, in a picture

    def __init__(self, observation_space: gym.spaces.Box, args: Args):
        super().__init__()
        shapes = ((observation_space.shape[0], 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))  # in, out, kernel, stride
        self.convs = nn.ModuleList(init_layer(nn.Conv2d(*shape)) for shape in shapes)
        gated, attends = args.attention == "gated", args.attention != "none"
        self.norms, self.blocks = nn.ModuleList(), nn.ModuleList()
        size = observation_space.shape[-1]  # 84, then rows (and columns) of locations: 20, 9, 7
        for conv in self.convs:
            size = (size - conv.kernel_size[0]) // conv.stride[0] + 1
            self.norms.append(nn.LayerNorm((size, size, conv.out_channels)))
            self.blocks.append(AttentionBlock(conv.out_channels, gated) if attends else None)
        # DEVIATION: row 4, ReLU after LayerNorm: without it only LayerNorm and attention are nonlinear
        self.activation = nn.Identity() if args.attention == "figure4" else nn.ReLU(inplace=True)
        self.num_features, self.feature_scale = 64 * size**2, args.feature_scale
        self.low_precision = args.matmul_precision == "bfloat16"

    def forward(self, obs: torch.Tensor, num_rows: int | None = None):
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.low_precision):
            x = obs.to(torch.float32, copy=True).mul_(1 / 255)  # (B, 4, 84, 84)
            attention = []
            for conv, norm, block in zip(self.convs, self.norms, self.blocks):
                x = self.activation(norm(conv(x).permute(0, 2, 3, 1)))  # (B, H, W, C)
                if block is not None:
                    tokens, rows = block(x.flatten(1, 2), num_rows)  # (B, H·W, C)
                    x = tokens.view_as(x)
                    attention.append(rows)
                x = x.permute(0, 3, 1, 2)  # (B, C, H, W), channels last in memory
        # DEVIATION: row 11, scaled down to the Nature CNN's size: at unit scale each of Adam's steps is a leap
        features = self.feature_scale * x.flatten(1).float()  # (B, 3136)
        return features if num_rows is None else (features, [rows.float() for rows in attention])

    def gates(self) -> dict[str, torch.Tensor]:
        """γ of each layer's attention, by the name under which it is logged."""
        gates = {f"gate_{k}": block.gate for k, block in enumerate(self.blocks, start=1) if block}
        return {name: gate for name, gate in gates.items() if gate is not None}

    @torch.no_grad()
    def attention_received(self, obs: torch.Tensor) -> list[torch.Tensor]:
        """Attention that each location receives over that of a uniform map, K tensors (B, n_k): 1 is average."""
        return [rows.sum(1) for rows in self(obs, num_rows=0)[1]]

    def pictures(self, obs: torch.Tensor) -> dict[str, np.ndarray]:
        """Tag -> RGB image (H, W, 3) uint8: a row per observation, its frame and each layer's attention on it."""
        received = self.attention_received(obs)
        frames = obs[:, -1].cpu().numpy()  # (B, 84, 84), the newest of the stack
        rows = []
        for i, frame in enumerate(frames):
            overlays = [attention_overlay(frame, x[i].cpu().numpy(), *at) for x, at in zip(received, self.locations)]
            rows.append(np.hstack([np.stack([frame] * 3, -1), *overlays]))
        return {"leader/attention_received": np.vstack(rows).repeat(2, axis=0).repeat(2, axis=1)} if received else {}


class AttentionBlock(nn.Module):
    """Self-attention over the n locations of a map (Figure 4): (B, n, C) -> (B, n, C)."""

    def __init__(self, channels: int, gated: bool):
        super().__init__()
        self.widths = [channels // 8, channels // 8, channels]
        self.project = nn.Linear(channels, sum(self.widths))  # Figure 4's three 1x1 convolutions at once
        # DEVIATION: row 4, x + γ·attention(x), not attention(x), which averages the map away
        self.gate = nn.Parameter(torch.zeros(())) if gated else None

    def forward(self, x: torch.Tensor, num_rows: int | None = None):
        """Returns (output, weights). Weights: None if `num_rows` is None; (B, n, n) if it is 0 or at least n; else
        (B, num_rows, n) of as many query rows drawn at random, the same for the whole batch.
        """
        n = x.shape[1]
        query, key, value = self.project(x).split(self.widths, dim=-1)  # (B, n, C/8), (B, n, C/8), (B, n, C)
        if num_rows is None:
            rows, attended = None, attend(query, key, value)
        elif 0 < num_rows < n:
            drawn = query[:, torch.randperm(n, device=x.device)[:num_rows]]
            rows, attended = attention_rows(drawn, key), attend(query, key, value)  # (B, r, n), (B, n, C)
        else:
            rows = attention_rows(query, key)  # (B, n, n), all of them: no use in fusing
            attended = torch.bmm(rows, value)
        return attended if self.gate is None else torch.addcmul(x, self.gate, attended), rows


# -- Fast attention: `attend` is softmax(Q Kᵀ / √d) V and nothing else -------------------------------
def attend(query, key, value) -> torch.Tensor:
    """softmax(Q Kᵀ / √d) V: query and key (B, n, d), value (B, n, C) -> (B, n, C).

    The plain product up to n = 100 locations, where it is the fastest. Beyond, kernels that never hold
    the n x n weights of the whole batch: tiles on a CPU, PyTorch's own on a GPU.
    """
    if query.shape[1] <= 100:
        return torch.bmm(attention_rows(query, key), value)
    if not query.is_cpu:  # padding with zeros changes no product, and fused kernels need equal widths
        scale = query.shape[-1] ** -0.5
        query, key = (F.pad(x, (0, value.shape[-1] - x.shape[-1])) for x in (query, key))
        heads = (x.unsqueeze(1) for x in (query, key, value))  # one head
        return F.scaled_dot_product_attention(*heads, scale=scale).squeeze(1)
    scale = math.log2(math.e) * query.shape[-1] ** -0.5  # e^x = 2^(x · log2 e)
    return TiledAttention.apply(query * scale, key.contiguous(), value.contiguous())


def attention_rows(query, key) -> torch.Tensor:
    """Attention weights softmax(Q Kᵀ / √d): query (B, r, d), key (B, n, d) -> (B, r, n), rows sum to 1.

    `baddbmm` scales within the product; with beta=0 it does not read its first argument. Rows under 48 (never on
    frames) are computed as columns, whose softmax takes half the time on a CPU.
    """
    scale, unused = query.shape[-1] ** -0.5, key.new_empty(())
    if key.shape[1] < 48:
        scores = torch.baddbmm(unused, key, query.transpose(1, 2), beta=0, alpha=scale)
        return scores.softmax(1).transpose(1, 2)
    return torch.baddbmm(unused, query, key.transpose(1, 2), beta=0, alpha=scale).softmax(-1)


class TiledAttention(torch.autograd.Function):
    """2^(Q Kᵀ) V, the powers' rows scaled to sum to 1, in tiles of a few samples that stay in the CPU's cache.

    The backward computes them again. On two cores twice as fast at n = 400 as PyTorch's fused
    kernel, which takes only equal widths and so needs d = 4 padded to C = 32. Differentiable twice.
    """

    @staticmethod
    def tiles(query, key, dim=-1):
        """Yields (slice of samples, their weights before they are scaled, scratch), reusing two buffers.

        With key and query swapped and `dim` 1, the weights are transposed.
        """
        n = query.shape[1]
        size = max(torch.get_num_threads(), 1_300_000 // n**2)  # samples; two buffers of 5 MB
        largest = query.abs().amax() * key.abs().amax() * query.shape[-1]  # no |score| is larger
        small = largest < 60  # then no power of 2 overflows, nor does a sum of them
        buffers = query.new_empty(2, size, n, n)
        for start in range(0, len(query), size):
            tile = slice(start, min(start + size, len(query)))
            weights, scratch = buffers[:, : tile.stop - tile.start]
            torch.bmm(query[tile], key[tile].transpose(1, 2), out=weights)
            if small:
                weights.exp2_()  # takes a third of a softmax's time
            else:
                torch.softmax(weights.mul_(math.log(2)), dim, out=weights)
            yield tile, weights, scratch

    @staticmethod
    def forward(ctx, query, key, value):
        output, sums = torch.empty_like(value), value.new_empty(*value.shape[:2], 1)
        for tile, weights, _ in TiledAttention.tiles(query, key):
            torch.sum(weights, -1, keepdim=True, out=sums[tile])
            torch.bmm(weights, value[tile], out=output[tile]).div_(sums[tile])
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, output, sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: leave that to the plain product
            plain = torch.bmm((torch.bmm(query, key.transpose(1, 2)) * math.log(2)).softmax(-1), value)
            return torch.autograd.grad(plain, (query, key, value), grad, create_graph=True)
        key_t = key.transpose(1, 2).contiguous()
        grad_query_t, grad_key, grad_value = map(torch.empty_like, (key_t, key, value))
        slope = grad / sums  # instead of dividing the weights
        mean = (slope * output).sum(-1).unsqueeze(1)  # (B, 1, n) Σ_j A_ij ∂L/∂A_ij of each row i, over its sum
        for tile, weights, scratch in TiledAttention.tiles(key, query, dim=1):  # Aᵀ: its products are faster
            torch.bmm(weights, slope[tile], out=grad_value[tile])
            torch.bmm(value[tile], slope[tile].transpose(1, 2), out=scratch)  # ∂L/∂Aᵀ over sums
            scratch.sub_(mean[tile]).mul_(weights)  # ∂L/∂(K Qᵀ) over log 2, the softmax's backward
            torch.bmm(scratch, query[tile], out=grad_key[tile])
            torch.bmm(key_t[tile], scratch, out=grad_query_t[tile])
        return math.log(2) * grad_query_t.transpose(1, 2), math.log(2) * grad_key, grad_value


def attention_overlay(frame: np.ndarray, received: np.ndarray, stride: int, offset: int) -> np.ndarray:
    """Colour a grey frame (84, 84) by the attention c that each location of a layer receives, (n,).

    c is 1 where uniform: there the frame shows as it is. It turns red by 1 - 1/c above and darker
    below. A location's colour lies on the centre of its receptive field: `stride` pixels for each, the
    first `offset` pixels from the edge.
    """
    size = round(len(received) ** 0.5)
    share = np.ones(frame.shape, dtype=np.float32)
    inside = slice(offset, offset + stride * size)
    share[inside, inside] = np.kron(received.reshape(size, size), np.ones((stride, stride)))
    heat = 1 - 1 / share.clip(1)
    grey = frame * share.clip(0.3, 1)
    return np.stack([grey + (255 - grey) * heat, grey * (1 - heat / 2), grey * (1 - heat / 2)], -1).astype(np.uint8)


def init_layer(layer: nn.Module, std: float = 2**0.5) -> nn.Module:
    """Orthogonal weights, zero bias: the usual initialisation of PPO."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


# ==================================================================================================
# Follower
# ==================================================================================================
class Follower(nn.Module):
    """Policy and value heads, φ. features (B, F) -> logits (B, A), value (B,)."""

    def __init__(self, num_features: int, action_space: gym.spaces.Discrete):
        super().__init__()
        self.hidden = init_layer(nn.Linear(num_features, 512))
        self.actor = init_layer(nn.Linear(512, int(action_space.n)), std=0.01)
        self.critic = init_layer(nn.Linear(512, 1), std=1.0)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu(self.hidden(features))  # (B, 512)
        return self.actor(x), self.critic(x).squeeze(-1)


def action_distribution(logits: torch.Tensor) -> Distribution:
    return Categorical(logits=logits, validate_args=False)  # validation would wait for the GPU


def sample(policy: Distribution) -> torch.Tensor:
    """Draws what policy.sample() draws, without its checks, which make the host wait for a GPU."""
    return (policy.probs / torch.empty_like(policy.probs).exponential_()).argmax(-1)


# ==================================================================================================
# Rollout
# ==================================================================================================
class Rollout(NamedTuple):
    """T steps of N environments, allocated once. Time runs along dimension 0."""

    obs: torch.Tensor  # (T, N, *observation), in the environment's type, channels last in memory
    actions: torch.Tensor  # (T, N), or (T, N, A) if they are vectors
    logprobs: torch.Tensor  # (T, N) under the policy that acted
    rewards: torch.Tensor  # (T, N) as the environment paid them: raw, unless delayed (see Disturbed)
    values: torch.Tensor  # (T, N)
    next_values: torch.Tensor  # (T, N) of the observation that the action truly led to; no effect where terminated
    terminations: torch.Tensor  # (T, N) 1.0 where nothing follows: no bootstrap
    dones: torch.Tensor  # (T, N) 1.0 where the episode ended, terminated or truncated


def allocate_rollout(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Rollout:
    """Memory for a rollout. Images are stored as (T, N, H, W, C), which is fast to convolve, and seen as
    (T, N, C, H, W).
    """
    (channels, *size), action_space = envs.single_observation_space.shape, envs.single_action_space
    dtypes = {"u": torch.uint8, "i": torch.long, "f": torch.float32}  # by NumPy's kind
    shape = (args.num_steps, args.num_envs)
    obs_dtype, action_dtype = (dtypes[x.dtype.kind] for x in (envs.single_observation_space, action_space))
    obs = torch.zeros((*shape, *size, channels), dtype=obs_dtype, device=device).movedim(-1, 2)
    actions = torch.zeros((*shape, *action_space.shape), dtype=action_dtype, device=device)
    return Rollout(obs, actions, *(torch.zeros(shape, device=device) for _ in range(6)))


def act(leader: Leader, follower: Follower, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Policy and values (N,) for `obs` (N, ...), see Follower: a function, so that it can be compiled as one."""
    return follower(leader(obs))


@torch.inference_mode()
def collect_rollout(
    envs: gym.vector.VectorEnv,
    obs: np.ndarray,
    leader: Leader,
    follower: Follower,
    rollout: Rollout,
    compiled: bool = False,
) -> tuple[np.ndarray, list[tuple[int, float, int]]]:
    """Play T steps from `obs` (N, ...) with the current policy, `compiled` or not, and fill `rollout` in place.

    Returns the observations to go on from, and for each game that ended (steps of its environment
    into the rollout, raw return, length).
    """
    num_steps, num_envs = rollout.rewards.shape
    rewards, terminations, dones = (np.zeros((num_steps, num_envs), dtype=np.float32) for _ in range(3))
    truncation_values, games, all_logits = [], [], []
    agent = torch.compile(act) if compiled else act
    on_gpu = rollout.obs.is_cuda  # a GPU copies from page-locked memory while the host goes on
    staging = torch.empty(obs.shape, dtype=rollout.obs.dtype, pin_memory=on_gpu)
    for t in range(num_steps):
        # `staging` is free again: waiting for the last step's actions, the host waited for its copy as well.
        rollout.obs[t].copy_(staging.copy_(torch.from_numpy(obs)), non_blocking=on_gpu)
        logits, rollout.values[t] = agent(leader, follower, rollout.obs[t])
        rollout.actions[t] = action = sample(action_distribution(logits))
        all_logits.append(logits)

        obs, rewards[t], terminated, truncated, info = envs.step(action.cpu().numpy())
        terminations[t], dones[t] = terminated, terminated | truncated
        truncated_only = truncated & ~terminated
        if truncated_only.any():  # rare: bootstrap from the final observation, not from the next game's first
            final_obs = torch.from_numpy(np.stack(info["final_obs"][truncated_only])).to(rollout.obs.device)
            truncation_values.append((t, torch.from_numpy(truncated_only), follower(leader(final_obs))[1]))
        if "_episode" in info:
            for row in np.flatnonzero(info["_episode"]):
                games.append((t + 1, float(info["episode"]["r"][row]), int(info["episode"]["l"][row])))

    logprobs = action_distribution(torch.cat(all_logits)).log_prob(rollout.actions.flatten(0, 1))  # (T·N,)
    rollout.logprobs.copy_(logprobs.view(num_steps, num_envs))
    rollout.next_values[:-1] = rollout.values[1:]
    rollout.next_values[-1] = follower(leader(torch.from_numpy(obs).to(rollout.obs.device)))[1]
    for t, rows, values in truncation_values:  # now: what was shifted above would have overwritten them
        rollout.next_values[t, rows.to(values.device)] = values
    for target, source in zip((rollout.rewards, rollout.terminations, rollout.dones), (rewards, terminations, dones)):
        target.copy_(torch.from_numpy(source))
    return obs, games


# ==================================================================================================
# Advantages
# ==================================================================================================
def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, Eq. 16).

    All tensors (T, N) float; `next_values[t]` is V of the observation that action t truly led to,
    before any reset. A termination zeroes the bootstrap, either end cuts the trace.
    Returns (advantages, returns), both (T, N).
    """
    deltas = rewards + gamma * next_values * (1 - terminations) - values  # (T, N)
    decay = gamma * gae_lambda * (1 - dones)  # (T, N)
    advantages = torch.zeros_like(rewards)
    trace = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        trace = deltas[t] + decay[t] * trace
        advantages[t] = trace
    return advantages, advantages + values


# ==================================================================================================
# Losses
# ==================================================================================================
class Batch(NamedTuple):
    """Transitions, flat: what the losses need of a rollout."""

    obs: torch.Tensor  # (B, *observation)
    actions: torch.Tensor  # (B,) or (B, A)
    logprobs: torch.Tensor  # (B,), like the rest
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def policy_objective(log_ratio, advantages, clip_coef):
    """PPO's clipped surrogate, to maximise: (B,) log ratios and advantages -> (B,)."""
    ratio = log_ratio.exp()
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def perception_cost(attention: list[torch.Tensor], kind: str) -> torch.Tensor:
    """What the leader pays for its attention, C_θ of Eq. (9) before λ_c: in [0, 1].

    attention: K row-stochastic tensors (B, n_k, n_k) -> (B,), the mean over layers (K = 0: scalar 0). For "entropy"
    and "l1", means over query rows, a sample of rows (B, r, n_k) gives an unbiased estimate.
    Raises ValueError on an unknown kind, and on sampled rows for "concentration".
    """
    costs = []
    for weights in attention:
        n = weights.shape[-1]
        # DEVIATION: row 2, costs with a gradient beside the printed norm, which has none
        if kind == "entropy":  # mean_i H(A_i) / log n: 1 for uniform rows, 0 for one-hot rows
            entropies = -(weights * (weights + 1e-30).log()).sum((-2, -1))  # (B,) of all rows together
            cost = entropies / (weights.shape[-2] * max(math.log(n), 1e-30))
        elif kind == "concentration":  # ‖A‖₁ induced, from [1, n] to [0, 1]: 1 if all rows look at one location
            if weights.shape[-2] != n:
                raise ValueError(f"concentration needs all {n} query rows, not {weights.shape[-2]}")
            cost = (weights.sum(-2).amax(-1) - 1) / max(n - 1, 1)
        elif kind == "l1":  # entrywise ‖A‖₁ / n: rows sum to 1, so a constant
            # Its gradient is exactly 0. Autograd's would be rounding errors, which Adam could blow up.
            cost = weights.detach().abs().sum(-1).mean(-1) + 0 * weights.sum((-2, -1))
        else:
            raise ValueError(f"unknown perception cost {kind!r}: entropy, concentration or l1")
        costs.append(cost)
    # DEVIATION: row 3, scaled to [0, 1] and averaged over layers where Eq. (9) adds up to 530
    return torch.stack(costs).mean(0).clamp(0, 1) if costs else torch.zeros(())


def leader_loss(logits, values, cost, batch: Batch, args: Args):
    """-u_L (Eq. 8, 10), plus the value error if that has a weight.

    logits: the policy as the follower gives it, B rows; values (B,); cost (B,), or () without attention: C_θ(s) before
    λ_c. Returns (loss, info), scalars.
    """
    logprobs = action_distribution(logits).log_prob(batch.actions)  # (B,)
    if args.leader_objective == "clipped":
        # DEVIATION: row 5, PPO's trust region for the leader too: line 10 is unbounded where Â < 0
        policy_term = policy_objective(logprobs - batch.logprobs, batch.advantages, args.clip_coef).mean()
    else:
        policy_term = (logprobs * batch.advantages).mean()  # line 10
    mean_cost = cost.mean().to(logits.device, non_blocking=True)  # without attention it is a zero on the CPU
    alpha = args.cooperation_weight
    # DEVIATION: row 1, α on the return as in Eq. (8); line 11 puts it on the cost
    utility = alpha * policy_term - (1 - alpha) * args.perception_cost_weight * mean_cost  # Eq. (8), (9)
    loss = -utility  # Eq. (10)
    if args.leader_value_coef:
        loss = loss + args.leader_value_coef * ((values - batch.returns) ** 2).mean()
    info = {
        "leader/utility": utility.detach(),
        "leader/policy_term": policy_term.detach(),
        "leader/perception_cost": mean_cost.detach(),
    }
    return loss, info


def follower_loss(logits, values, batch: Batch, args: Args):
    """Algorithm 1, lines 14-17: -L_CLIP + vf_coef * L_V - ent_coef * H.

    logits: the policy as the follower gives it, B rows; values (B,). Returns (loss, info), scalars.
    """
    policy = action_distribution(logits)
    log_ratio = policy.log_prob(batch.actions) - batch.logprobs  # (B,)
    policy_loss = -policy_objective(log_ratio, batch.advantages, args.clip_coef).mean()
    value_error = (values - batch.returns) ** 2  # (B,)
    if args.clip_value_loss:
        clipped = batch.values + (values - batch.values).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, (clipped - batch.returns) ** 2)
    value_loss = value_error.mean()
    entropy = policy.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy  # line 17
    with torch.no_grad():
        change = log_ratio.expm1()  # (B,) of the probability ratio from 1
        info = {
            "losses/policy_loss": policy_loss.detach(),
            "losses/value_loss": value_loss.detach(),
            "losses/entropy": entropy.detach(),
            "losses/approx_kl": (change - log_ratio).mean(),  # http://joschu.net/blog/kl-approx.html
            "losses/clipfrac": (change.abs() > args.clip_coef).float().mean(),
        }
    return loss, info


# ==================================================================================================
# Update
# ==================================================================================================
def make_batch(rollout: Rollout, leader: Leader, args: Args) -> Batch:
    """The transitions of a rollout, flat (T·N), with what is learnt from: advantages and returns."""
    rewards = learner_rewards(rollout, leader, args)
    ends = rollout.terminations, rollout.dones
    advantages, returns = compute_gae(rewards, rollout.values, rollout.next_values, *ends, args.gamma, args.gae_lambda)
    if args.norm_adv == "rollout":
        advantages = normalise(advantages)
    columns = (rollout.obs, rollout.actions, rollout.logprobs, rollout.values, advantages, returns)
    return Batch(*(tensor.flatten(0, 1) for tensor in columns))


def learner_rewards(rollout: Rollout, leader: Leader, args: Args) -> torch.Tensor:
    """The rewards (T, N) that the advantages are made of."""
    delayed = args.reward_delay > 1  # and then clipped already, see Disturbed
    rewards = rollout.rewards.sign() if args.clip_rewards and not delayed else rollout.rewards
    if args.perception_cost_in_reward:  # R - λ_c C_θ(s), as in Eq. (13)
        with torch.no_grad():
            costs = [perceive(leader, obs, args)[1] for obs in rollout.obs]
        rewards = rewards - args.perception_cost_weight * torch.stack(costs)
    return rewards


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance, over the values of all processes (each holds equally many)."""
    mean, num_processes = x.mean(), processes()[1]
    average_([mean])
    # Unbiased: the average over processes of P·Σ(x - mean)² / (P·n - 1) is the sum over all P·n values / (P·n - 1).
    variance = (x - mean).square().sum() * (num_processes / (num_processes * x.numel() - 1))
    average_([variance])
    return (x - mean) / (variance.sqrt() + 1e-8)


def update(leader: Leader, follower: Follower, leader_optimizer, follower_optimizer, batch: Batch, args: Args):
    """All epochs over one rollout. Returns the means of what the losses report, and `attention_info`."""
    # "stopped", "separate" and "simultaneous" share a function.
    step = {"stackelberg": stackelberg_step, "joint": joint_step}.get(args.update, simultaneous_step)
    if args.compile:
        # PyTorch searches for a KL's formula at its first use, which cannot be traced and would cut every step.
        policy = action_distribution(follower(leader(batch.obs[:1]))[0])
        kl_divergence(policy, policy)
        step = torch.compile(step)
    history = []
    for _ in range(args.update_epochs):
        epoch = []
        for indices in torch.randperm(len(batch.obs)).to(batch.obs.device).split(args.minibatch_size):
            minibatch = select_minibatch(batch, indices, args)
            epoch.append(step(leader, follower, leader_optimizer, follower_optimizer, minibatch, args))
        history += epoch
        if args.target_kl is not None and mean_info(epoch)["losses/approx_kl"] > args.target_kl:
            break
    check_agent(leader, follower, minibatch.obs)
    return mean_info(history) | attention_info(leader, minibatch.obs)


def stackelberg_step(leader, follower, leader_optimizer, follower_optimizer, minibatch: Batch, args: Args):
    """SPRIG: leader, then follower, on one minibatch (Algorithm 1, lines 6-18)."""
    theta, phi = (list(named_parameters(player).values()) for player in (leader, follower))

    # 1. The leader moves: ascend u_L in θ. φ is held fixed (line 12), or the follower's answer anticipated (Eq. 6).
    features, cost = perceive(leader, minibatch.obs, args)  # lines 7-8
    logits_before, values = follower(features)  # line 9
    loss, info = leader_loss(logits_before, values, cost, minibatch, args)  # lines 10-11
    if args.leader_gradient == "first-order":
        # DEVIATION: row 7, Eq. (6) asks for the total derivative through φ*(θ); Algorithm 1 takes this one
        gradients = differentiate(loss, theta)
    else:
        gradients, gradient_info = total_derivative(follower, features, cost, theta, phi, minibatch, args)
        info |= gradient_info
    # θ's gradients are taken. Drop the graph: torch.compile splits the step at `descend` and cannot carry one across.
    loss, logits_before, values = loss.detach(), logits_before.detach(), values.detach()
    info["leader/grad_norm"] = descend([leader_optimizer], gradients, args.max_grad_norm, leader=leader)

    # 2. The follower sees what the leader now shows: features recomputed, θ held fixed (line 13).
    with torch.no_grad():
        new_features = leader(minibatch.obs)

    # 3. The follower answers: descend L_φ in φ (lines 14-18).
    logits, values = follower(new_features)
    # DEVIATION: row 6, line 17's C_θ left out: it does not depend on φ
    loss, follower_info = follower_loss(logits, values, minibatch, args)
    gradients = differentiate(loss, phi)
    with torch.no_grad():  # how far the leader's move alone has changed the policy
        info["leader/kl"] = kl_divergence(action_distribution(logits_before), action_distribution(logits)).mean()
    info["losses/grad_norm"] = descend([follower_optimizer], gradients, args.max_grad_norm, follower=follower)
    return info | follower_info


def simultaneous_step(leader, follower, leader_optimizer, follower_optimizer, minibatch: Batch, args: Args):
    """Both players move at once, from the same θ and φ: nobody leads. The rungs between PPO and SPRIG (--update)."""
    theta, phi = (list(named_parameters(player).values()) for player in (leader, follower))
    features, cost = perceive(leader, minibatch.obs, args)
    logits, values = follower(features)
    loss, info = follower_loss(logits, values, minibatch, args)
    if args.update == "simultaneous":
        theta_loss, leader_info = leader_loss(logits, values, cost, minibatch, args)  # Eq. (8)
        info |= leader_info
    else:  # PPO's, but θ takes no value gradient
        theta_loss, _ = follower_loss(logits, values.detach(), minibatch, args)
    theta_gradients = differentiate(theta_loss, theta, retain_graph=True)
    phi_gradients = differentiate(loss, phi)
    if args.update == "stopped":  # under one norm clip, as in PPO
        optimizers, gradients = [leader_optimizer, follower_optimizer], theta_gradients + phi_gradients
        norm = descend(optimizers, gradients, args.max_grad_norm, leader=leader, follower=follower)
        return info | {"losses/grad_norm": norm}
    leader_norm = descend([leader_optimizer], theta_gradients, args.max_grad_norm, leader=leader)
    follower_norm = descend([follower_optimizer], phi_gradients, args.max_grad_norm, follower=follower)
    return info | {"leader/grad_norm": leader_norm, "losses/grad_norm": follower_norm}


def joint_step(leader, follower, leader_optimizer, follower_optimizer, minibatch: Batch, args: Args):
    """PPO: encoder and heads descend one loss under one norm clip. Two Adams of equal settings act as one would."""
    logits, values = follower(leader(minibatch.obs))
    loss, info = follower_loss(logits, values, minibatch, args)
    parameters = [parameter for player in (leader, follower) for parameter in named_parameters(player).values()]
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    optimizers = [leader_optimizer, follower_optimizer]
    info["losses/grad_norm"] = descend(optimizers, gradients, args.max_grad_norm, leader=leader, follower=follower)
    return info


def total_derivative(follower, features, cost, theta, phi, minibatch: Batch, args: Args):
    """`leader_gradient` for --leader-gradient unrolled and implicit. Returns (gradients, info).

    Both losses depend on θ only by `features` and `cost`, whose graph leads back to it, so that the functions of (θ, φ)
    below ignore their first argument.
    """

    def leader_loss_fn(_, phi):
        return leader_loss(*call_with(follower, phi, features), cost, minibatch, args)[0]

    def follower_loss_fn(_, phi):
        return follower_loss(*call_with(follower, phi, features), minibatch, args)[0]

    options = {"step_size": args.unroll_step_size, "num_steps": args.unroll_steps, "damping": args.implicit_damping}
    options |= {"cg_iterations": args.cg_iterations, "cg_tolerance": args.cg_tolerance, "clamp": args.correction_clamp}
    method, info = args.leader_gradient, {}
    gradients = leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, method, **options, info=info)
    return gradients, info  # which leader_gradient has filled


def leader_gradient(
    leader_loss_fn,
    follower_loss_fn,
    theta: list[torch.Tensor],
    phi: list[torch.Tensor],
    method: str = "first-order",
    *,
    step_size: float = 0.1,
    num_steps: int = 1,
    damping: float = 0.0,
    cg_iterations: int = 100,
    cg_tolerance: float = 1e-10,
    clamp: float | None = None,
    info: dict[str, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Gradient of the leader's loss f_L for each tensor of theta, to descend.

    Both functions map (theta, phi), lists of tensors, to a scalar to minimise. Methods:
    - "first-order": ∂f_L/∂θ, Algorithm 1. The follower's answer to θ is not anticipated.
    - "unrolled": d/dθ f_L(θ, φ⁺(θ)), where φ⁺ is φ after `num_steps` steps of size `step_size` down ∇_φ f_F.
    - "implicit": ∂f_L/∂θ - M (H + damping·I)⁻¹ ∂f_L/∂φ with H = ∇²_φφ f_F, M = ∇²_θφ f_F: Eq. (6) by the implicit
      function theorem, the solve by conjugate gradients (`cg_iterations`, `cg_tolerance` of the residual's norm).
    An option of another method is ignored. The correction, total minus first-order gradient, is scaled down to `clamp`
    times the first-order gradient's norm where it is longer. By default nothing is damped or clamped.
    `info` receives the unclamped correction's norm, relative to the first-order gradient's, the cosine between
    the returned and the first-order gradient, and, for "implicit", the solve's relative residual.
    Raises ValueError on an unknown method.
    """
    if method not in ("first-order", "unrolled", "implicit"):
        raise ValueError(f"unknown leader gradient {method!r}: first-order, unrolled or implicit")
    theta, phi = ([x if x.requires_grad else x.detach().requires_grad_() for x in player] for player in (theta, phi))
    loss = leader_loss_fn(theta, phi)
    if method == "first-order":
        return differentiate(loss, theta)

    info = {} if info is None else info
    if method == "unrolled":
        first_order = differentiate(loss, theta, retain_graph=True)
        answer = phi
        for _ in range(num_steps):
            downhill = average_with_gradient(differentiate(follower_loss_fn(theta, answer), answer, create_graph=True))
            answer = [x - step_size * dx for x, dx in zip(answer, downhill)]
        total = differentiate(leader_loss_fn(theta, answer), theta)
        correction = [a - b for a, b in zip(total, first_order)]
    else:
        by_both = differentiate(loss, theta + phi, retain_graph=True)
        first_order, v = by_both[: len(theta)], flatten(by_both[len(theta) :])
        slope = flatten(differentiate(follower_loss_fn(theta, phi), phi, create_graph=True))  # ∂f_F/∂φ

        def curvature(x):  # (H + λI) x. Only φ is asked for, so that autograd stops at the features
            product = flatten(differentiate(slope.dot(x), phi, retain_graph=True))
            average_([product])
            return product + damping * x

        average_([v])
        x, info["leader/cg_residual"] = conjugate_gradients(curvature, v, cg_iterations, cg_tolerance)
        correction = [-dx for dx in differentiate(slope.dot(x), theta)]  # -M x, one vector-Jacobian product

    average_(first_order + correction)  # both lists, each tensor in place
    norm, correction_norm = nn.utils.get_total_norm(first_order), nn.utils.get_total_norm(correction)
    tiny = torch.finfo(norm.dtype).tiny
    scale = 1.0 if clamp is None else (clamp * norm / correction_norm.clamp_min(tiny)).clamp(max=1)
    total = [a + scale * b for a, b in zip(first_order, correction)]
    info["leader/correction_ratio"] = correction_norm / norm.clamp_min(tiny)
    info["leader/correction_cosine"] = F.cosine_similarity(flatten(first_order), flatten(total), dim=0, eps=tiny)
    return total


def differentiate(output: torch.Tensor, inputs: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """∂output/∂input for each input; zeros for those that a scalar does not depend on."""
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(output, inputs, materialize_grads=True, **options))


def average_with_gradient(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Means over all processes, differentiable: the backward averages as well."""
    if not dist.is_initialized():
        return tensors
    return [all_reduce(tensor.contiguous()) / processes()[1] for tensor in tensors]


def conjugate_gradients(product, v: torch.Tensor, iterations: int, tolerance: float):
    """Solve A x = v for symmetric A, given as product(x) = A x (Hestenes, Stiefel 1952).

    Stops at a residual of `tolerance` · ‖v‖, and where pᵀAp <= 0: along such a direction the follower
    has no minimum, and x stays what it was before. Returns (x, ‖v - A x‖ / ‖v‖). On a GPU each
    iteration waits for the device, to spare the iterations that are not needed.
    """
    x, residual, direction = torch.zeros_like(v), v, v
    start = squared = v.dot(v)
    for _ in range(iterations):
        if squared <= tolerance**2 * start:
            break
        curved = product(direction)  # A p
        curvature = direction.dot(curved)
        if not curvature > 0:
            break
        step = squared / curvature
        x, residual = x + step * direction, residual - step * curved
        before, squared = squared, residual.dot(residual)
        direction = residual + squared / before * direction
    return x, (squared / start.clamp_min(torch.finfo(v.dtype).tiny)).sqrt()


def call_with(module: nn.Module, parameters: list[torch.Tensor], *inputs, **options):
    """module(*inputs) as a function of its parameters."""
    return functional_call(module, dict(zip(named_parameters(module), parameters)), inputs, options)


def select_minibatch(batch: Batch, indices: torch.Tensor, args: Args) -> Batch:
    minibatch = Batch(*(tensor[indices] for tensor in batch))
    if args.norm_adv == "minibatch":
        minibatch = minibatch._replace(advantages=normalise(minibatch.advantages))
    return minibatch


def perceive(leader: Leader, obs: torch.Tensor, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """What the leader makes of `obs`, and what it pays for that: (features (B, F), C_θ (B,), Eq. (9))."""
    num_rows = 0 if args.perception_cost == "concentration" else args.cost_rows  # query rows per layer; 0: all
    features, attention = leader(obs, num_rows=num_rows)
    return features, perception_cost(attention, args.perception_cost).expand(len(obs))


def descend(optimizers: list, gradients: list[torch.Tensor], max_norm: float, **players: nn.Module) -> torch.Tensor:
    """One step of the players down their `gradients`, averaged over processes and clipped to the norm `max_norm`.

    Returns the norm before clipping. If it is not finite, raises FloatingPointError before the step, which names the
    first tensor to blame: for that alone are `players`, by role, in the order of `gradients`. On a GPU, where a check
    means waiting, `mean_info` checks after the epochs.
    """
    gradient = flatten(gradients)
    average_([gradient])
    norm = gradient.square().sum().sqrt()  # norm() of millions of float32 is off by some 1e-5 on a CPU
    if gradient.is_cpu and not norm.isfinite():
        parameters = {f"{role}.{n}": p for role, player in players.items() for n, p in named_parameters(player).items()}
        require_finite({f"the parameter {name}": parameter for name, parameter in parameters.items()})
        require_finite({f"the gradient of {name}": piece for name, piece in zip(parameters, gradients)})
        require_finite({"the gradient's norm": norm})
    gradient *= (max_norm / (norm + 1e-6)).clamp(max=1)
    # An optimizer holds one flat vector, of which its player's parameters are views (see one_vector).
    vectors = [vector for optimizer in optimizers for group in optimizer.param_groups for vector in group["params"]]
    for vector, piece in zip(vectors, gradient.split([vector.numel() for vector in vectors])):
        vector.grad = piece.view_as(vector)
    for optimizer in optimizers:
        optimizer.step()
    return norm


def require_finite(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")


@torch.no_grad()
def check_agent(leader: Leader, follower: Follower, obs: torch.Tensor) -> None:
    """Raises FloatingPointError if an update has left an agent that cannot act or must not be saved."""
    players = {"leader": leader, "follower": follower}
    require_finite({f"the parameter {name}.{n}": p for name in players for n, p in players[name].named_parameters()})
    logits, values = follower(leader(obs))
    require_finite({"the policy": logits, "the value": values})


@torch.no_grad()
def attention_info(leader: Leader, obs: torch.Tensor) -> dict[str, float]:
    """The gates, and each layer's normalised attention entropy (24 random rows) on the last minibatch."""
    info = {f"leader/{name}": gate.item() for name, gate in leader.gates().items()}
    for k, rows in enumerate(leader(obs, num_rows=24)[1], start=1):
        info[f"leader/attention_entropy_{k}"] = perception_cost([rows], "entropy").mean().item()
    return info


def mean_info(history: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Means over minibatches (and processes), fetched from the device in one go.

    Raises FloatingPointError if a loss or a gradient's norm is not finite.
    """
    table = torch.stack([torch.stack([info[name] for name in history[0]]) for info in history])
    average_([table])
    means = dict(zip(history[0], table.mean(0).tolist()))
    for name, mean in means.items():  # on a GPU the only check of each step (see descend)
        if name.endswith(("loss", "utility", "grad_norm")) and not np.isfinite(mean):
            raise FloatingPointError(f"{name} is not finite")
    return means


def make_optimizer(module: nn.Module, args: Args) -> torch.optim.Adam:
    """Adam over one flat vector: one operation instead of one per tensor (a tenth of a step on vectors)."""
    rate = args.learning_rate * (args.leader_rate_factor if isinstance(module, Leader) else 1)
    return torch.optim.Adam([{"params": one_vector(module), "initial_lr": rate}], lr=rate, eps=1e-5, fused=True)


def one_vector(module: nn.Module) -> list[nn.Parameter]:
    """Turns a player's parameters into views of one vector. Returns [that vector], or [] if there are none."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]  # a fork may freeze some
    if not parameters:
        return []
    vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    nn.utils.vector_to_parameters(vector.detach(), parameters)  # makes them views, copies nothing
    return [vector]


@functools.lru_cache(maxsize=8)
def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Its trained parameters, cached: collecting them anew costs small networks some percent of a step."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


# ==================================================================================================
# Logging
# ==================================================================================================
PICTURE_INTERVAL = 100_000  # agent steps between two rounds of pictures


def start_run(args: Args) -> Path:
    """Make the folder of a new run, with its args.json, or check that `args` continue the run `args.resume`."""
    if args.resume:
        refuse_changes(Path(args.resume), args)
        return Path(args.resume)
    record = run_record(args)  # before the folder is made: this tries the task out
    if args.run_dir:
        run_dir = Path(args.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            fail(f"--run-dir {run_dir} is not empty; name a new folder, or continue that run with --resume")
    else:
        name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
        run_dir = make_folder(Path("runs") / name)
    write_json(run_dir / "args.json", record)
    return run_dir


def make_folder(path: Path) -> Path:
    """Make a folder of that name, or, if there is one (of a run started in the same second), with -1, -2, ... added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        folder = path.with_name(f"{path.name}-{number}") if number else path
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def start_writer(run_dir: Path, args: Args, global_step: int) -> SummaryWriter:
    """Open TensorBoard (and Weights & Biases); in a resumed run, purge the points after `global_step`."""
    record = run_record(args)
    # The writer's thread hands its OSError to the main thread, which reports it (see `main`).
    threading.excepthook = lambda hook: issubclass(hook.exc_type, OSError) or threading.__excepthook__(hook)
    if args.track:
        import wandb

        identity = re.sub(r"[^\w.-]+", "-", "-".join(run_dir.resolve().parts[-3:])).strip("-")[-128:]
        wandb.init(project="sprig", id=identity, resume="allow", config=record, sync_tensorboard=True)
    if args.resume:
        before = json.loads((run_dir / "args.json").read_text())
        warn_of_changes(run_dir)
        history = before.get("resumed", []) + [{"step": global_step, "versions_before": before.get("versions")}]
        write_json(run_dir / "args.json", record | {"resumed": history})  # the new total, device, ...
        return SummaryWriter(run_dir, purge_step=global_step + 1)
    writer = SummaryWriter(run_dir)
    rows = {**record["arguments"], **record["protocol"], **record["versions"]}
    writer.add_text("hyperparameters", "|parameter|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in rows.items()))
    return writer


def run_record(args: Args) -> dict:
    """What a result depends on: arguments, protocol, versions."""
    return {
        "script": Path(__file__).name,
        "arguments": dataclasses.asdict(args) | {"resume": ""},
        "protocol": env_protocol(args),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # of its text
    packages = {name: installed(name) for name in ("torch", "gymnasium", "numpy", *SIMULATORS)}
    return {"script": script, "python": platform.python_version()} | packages


def warn_of_changes(run_dir: Path) -> None:
    """Say what differs between the script and packages that made a run and those that load it."""
    before, now = json.loads((run_dir / "args.json").read_text()).get("versions") or {}, versions()
    changed = [f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        print(f"warning: {run_dir} is of {'; '.join(changed)}: no longer bit-identical", file=sys.stderr)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def log_iteration(writer: SummaryWriter, metrics: dict, games: list, global_step: int, args: Args) -> None:
    """Write the metrics of the iteration that ends at `global_step`, and its games where they ended."""
    for t, episodic_return, episodic_length in games:
        step = global_step - (args.num_steps - t) * args.num_envs  # when the game ended
        writer.add_scalar("charts/episodic_return", episodic_return, step)
        writer.add_scalar("charts/episodic_length", episodic_length, step)
    for tag, value in metrics.items():
        writer.add_scalar(tag, value, global_step)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var[returns - values] / Var[returns]: 1 is a perfect critic, 0 a constant one."""
    return float(1 - (returns - values).var() / returns.var())


# ==================================================================================================
# Evaluation
# ==================================================================================================
@torch.inference_mode()
def evaluate(leader: Leader, follower: Follower, args: Args, device: torch.device, stop=None) -> dict:
    """Play `args.eval_episodes` whole games on seeds that training never used.

    One environment per game, each game counted: taking the first games to end among many would
    favour short ones. Leaves the global random state as it was. Returns, ready for JSON, the games' raw
    "returns" and their "lengths" in agent steps, "mean" and "std" of the returns, "greedy", and the "protocol".
    Raises KeyboardInterrupt if `stop` (a StopSignal) is requested before the end.
    """
    num_games, protocol = args.eval_episodes, env_protocol(args)
    envs = make_envs(dataclasses.replace(args, num_envs=num_games))
    obs, _ = envs.reset(seed=env_seeds(args.seed, 1, num_envs=num_games))  # stream 1; training is stream 0
    returns, lengths, playing = np.zeros(num_games), np.zeros(num_games, dtype=int), np.ones(num_games, dtype=bool)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        while playing.any():
            if stop and stop.requested:
                raise KeyboardInterrupt
            logits, _ = follower(leader(torch.from_numpy(obs[playing]).to(device)))
            policy = action_distribution(logits)
            action = (policy.mode if args.eval_greedy else sample(policy)).cpu().numpy()
            actions = np.zeros((num_games, *action.shape[1:]), dtype=action.dtype)  # a finished game idles
            actions[playing] = action
            obs, _, _, _, info = envs.step(actions)
            if "_episode" in info:
                ended = info["_episode"] & playing
                returns[ended], lengths[ended] = info["episode"]["r"][ended], info["episode"]["l"][ended]
                playing &= ~ended
    envs.close()
    return {
        "returns": returns.tolist(),
        "lengths": lengths.tolist(),
        "mean": float(returns.mean()),
        "std": float(returns.std()),
        "greedy": args.eval_greedy,
        "protocol": protocol,
    }


def evaluate_run(args: Args) -> dict:
    """`--evaluate`: play the agent of a saved run, by the protocol of the evaluation after training."""
    run_dir = Path(args.evaluate)
    refuse_changes(run_dir, args)
    if not args.eval_episodes:
        fail("--evaluate needs at least one game: --eval-episodes")
    device = pick_device(args.device)
    envs = make_envs(dataclasses.replace(args, num_envs=1))
    leader = Leader(envs.single_observation_space, args).to(device)
    follower = Follower(leader.num_features, envs.single_action_space).to(device)
    envs.close()
    load_agent(run_dir, leader, follower)
    evaluation = evaluate(leader, follower, args, device)
    report_evaluation(run_dir, evaluation)
    return evaluation


def report_evaluation(run_dir: Path, evaluation: dict) -> None:
    """Print the score, and write evaluation.json; an earlier one is kept under a number."""
    print(f"evaluation over {len(evaluation['returns'])} games: {evaluation['mean']:.1f} ± {evaluation['std']:.1f}")
    write_json(run_dir / "evaluation.json", evaluation, keep=True)


# ==================================================================================================
# Checkpoint
# ==================================================================================================
def write_atomically(path: Path, data: bytes, keep: bool = False) -> None:
    """All or nothing: write a temporary file that no loader picks up, sync, rename.

    With `keep`, what has that name already is set aside.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            set_aside(path)
        os.replace(temporary, path)
    finally:  # if it is still there, something went wrong
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the new name should survive a power cut, too, where a folder can be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, record: dict, keep: bool = False) -> None:
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode(), keep)


def write_state(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def checkpoint_paths(run_dir: Path, before: float = np.inf) -> list[Path]:
    """Those of steps less than `before`, newest first."""
    names = {path: path.stem.removeprefix("checkpoint-") for path in run_dir.glob("checkpoint-*.pt") if path.is_file()}
    steps = {path: int(step) for path, step in names.items() if step.isdecimal() and int(step) < before}
    return sorted(steps, key=steps.get, reverse=True)


def save_checkpoint(run_dir: Path, parts: dict, progress: dict) -> None:
    """Write checkpoint-<step>.pt: the state of all `parts`, `progress`, and the random state. Keeps the last two.

    The state of the games is not saved. So that a resumed run equals one that went on, the caller
    makes the environments anew at each checkpoint, and seeds them by (seed, step).
    """
    state = {name: part.state_dict() for name, part in parts.items()} | {"progress": progress}
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []  # of the one that this process trains on
    state["random"] = gather({"cpu": torch.get_rng_state(), "cuda": gpu})
    if processes()[0] == 0:
        write_state(run_dir / f"checkpoint-{progress['global_step']}.pt", state)
        # Checkpoints of later steps do not count: this run was resumed from before them, so they could not be read.
        for path in checkpoint_paths(run_dir, before=progress["global_step"])[1:]:
            path.unlink()


def read_state(path: Path, parts: dict) -> dict:
    """Put what a file holds of `parts` into them. Raises whatever is wrong with the file."""
    with zipfile.ZipFile(path) as archive:  # torch writes check sums but does not read them
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
        if isinstance(part, nn.Module):
            require_finite({f"{name}.{key}": tensor for key, tensor in part.state_dict().items()})
    return state


def load_checkpoint(run_dir: Path, parts: dict) -> dict:
    """Put the newest readable checkpoint into `parts`. Returns its "progress" and "random"."""
    for path in checkpoint_paths(run_dir):
        try:
            state = read_state(path, parts)
            return {key: state[key] for key in ("progress", "random")}
        except Exception as error:  # whatever is wrong with this one, the one before may be good
            print(f"warning: {path} cannot be read: {one_line(error)}", file=sys.stderr)
    fail(f"{run_dir} holds no checkpoint that can be read; nothing was changed")


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def restore_random_state(states: list[dict]) -> None:
    """Take over the random state of the process that had this rank."""
    rank, num_processes = processes()
    if len(states) != num_processes:
        fail(f"that run was trained by {len(states)} process(es), not {num_processes}; resume it with as many")
    torch.set_rng_state(states[rank]["cpu"])
    if states[rank]["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[rank]["cuda"][0])


def load_agent(run_dir: Path, leader: Leader, follower: Follower) -> None:
    """The weights of a finished run (model.pt), or of the newest checkpoint of one that is not."""
    warn_of_changes(run_dir)
    players, path = {"leader": leader, "follower": follower}, run_dir / "model.pt"
    for player in players.values():
        one_vector(player)  # the memory layout of training, on which the rounding of products depends
    if not path.exists():
        load_checkpoint(run_dir, players)
    else:
        try:
            read_state(path, players)
        except Exception as error:
            fail(f"{path} cannot be read: {one_line(error)}")


# What may differ when a run is resumed: how long it is, where it runs, and how its numbers are rounded.
MAY_CHANGE = {"total_timesteps", "device", "threads", "matmul_precision", "compile", "eval_episodes", "eval_greedy"}
MAY_CHANGE |= {"track", "resume", "evaluate"}


def read_args(run_dir: Path) -> Args:
    """The arguments that a run of this script was started with."""
    try:
        record = json.loads((run_dir / "args.json").read_text())
        if record["script"] != Path(__file__).name:
            fail(f"{run_dir} is a run of {record['script']}, not of {Path(__file__).name}")
        arguments = {name: tuple(x) if isinstance(x, list) else x for name, x in record["arguments"].items()}
        saved = check_types(Args(**arguments))
        if missing := {field.name for field in dataclasses.fields(Args)} - record["arguments"].keys() - MAY_CHANGE:
            # today's default need not be what that version did
            way = "go on with that version, or write the value that does what it did into args.json"
            fail(f"{run_dir} was made by a version without {flag(min(missing))}; {way}")
        return saved
    except OSError as error:
        fail(f"{run_dir} is not the folder of a run: args.json: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{run_dir}/args.json is damaged or of another version: {error}")


def refuse_changes(run_dir: Path, args: Args) -> None:
    """A saved run goes on, and is evaluated, with the arguments that it was trained with."""
    saved = read_args(run_dir)
    for field in dataclasses.fields(Args):
        old, new = getattr(saved, field.name), getattr(args, field.name)
        if new not in (old, "") and field.name not in MAY_CHANGE:  # "": --run-dir was left out
            name = flag(field.name)
            fail(f"{run_dir} was trained with {name} {old}, not {new}; leave out {name}")


def set_aside(path: Path) -> None:
    """Rename a file, if it is there, before it is rewritten: evaluation.json becomes evaluation-1.json, -2, ..."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
    if path.exists():
        path.rename(next(name for name in names if not name.exists()))


# ==================================================================================================
# Main
# ==================================================================================================
class StopSignal:
    """SIGINT and SIGTERM: the first sets `requested`, at which the iteration ends and is saved; the second exits."""

    def __enter__(self):
        self.requested, self.previous = False, {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        with contextlib.suppress(OSError):  # not print: the signal may have interrupted another print
            os.write(2, b"\nstopping after this iteration; repeat to exit at once\n")


def main(args: Args) -> dict:
    """Train, evaluate, save. Returns the evaluation (empty with `--eval-episodes 0`)."""
    args = check_args(args)
    set_matmul_precision(args.matmul_precision)
    torch.set_num_threads(args.threads or DEFAULT_THREADS)
    try:
        if args.evaluate:
            return evaluate_run(args)
        device = pick_device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The first process makes the folder before it meets the others: if it cannot, torchrun ends them.
        run_dir = start_run(args) if args.resume or os.environ.get("RANK", "0") == "0" else None
        if "WORLD_SIZE" in os.environ:  # torchrun: the games and each minibatch are split over its processes
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        with StopSignal() as stop:
            return train(args, gather(run_dir)[0], device, stop)
    except FloatingPointError as error:  # of a game in an evaluation or at a restart; training names the iteration
        fail(str(error))
    except OSError as error:  # a full disk, a folder that was removed
        place = os.fsdecode(error.filename or args.resume or args.evaluate or args.run_dir or "runs")
        fail(f"{place} cannot be written: {error.strerror or error}; what was saved before is untouched")


def train(args: Args, run_dir: Path, device: torch.device, stop: StopSignal) -> dict:
    """From the first rollout, or that after the newest checkpoint, to the evaluation."""
    keep_freed_memory()
    if args.compile:
        prepare_compiler(device)
    rank, num_processes = processes()
    per_process = {name: getattr(args, name) // num_processes for name in ("num_envs", "minibatch_size")}
    my_args = dataclasses.replace(args, **per_process)  # what this process plays and learns from; `args`: all together

    torch.manual_seed(args.seed)
    envs = make_envs(my_args)
    leader = Leader(envs.single_observation_space, args).to(device)
    follower = Follower(leader.num_features, envs.single_action_space).to(device)
    leader_optimizer, follower_optimizer = (make_optimizer(player, args) for player in (leader, follower))
    if rank:
        # The same networks in all processes, different actions. (PyTorch's generator on a CPU reads 32 bits of a seed.)
        torch.manual_seed(int(env_seeds(args.seed, 4, rank, num_envs=1)[0]))
    parts = {"leader": leader, "follower": follower}
    parts |= {"leader_optimizer": leader_optimizer, "follower_optimizer": follower_optimizer}
    progress = {"global_step": 0, "recent_returns": [], "shown_obs": None}
    if args.resume:
        state = load_checkpoint(run_dir, parts)
        restore_random_state(state["random"])
        progress = state["progress"]
        if len(steps := set(gather(progress["global_step"]))) > 1:  # a shared folder may look older from elsewhere
            fail(f"the processes read different checkpoints of {run_dir}, of steps {sorted(steps)}; start again")
        if progress["global_step"] > args.total_timesteps:
            fail(f"--total-timesteps {args.total_timesteps}: {run_dir} has taken {progress['global_step']} already")
    else:
        save_checkpoint(run_dir, parts, progress)
    rollout_size = args.num_steps * args.num_envs
    first_iteration, num_iterations = progress["global_step"] // rollout_size, args.total_timesteps // rollout_size
    writer = start_writer(run_dir, args, progress["global_step"]) if rank == 0 else None
    if rank == 0 and first_iteration < num_iterations:
        set_aside(run_dir / "model.pt")  # left by this run's end before it was extended
        set_aside(run_dir / "evaluation.json")

    rollout = allocate_rollout(my_args, envs, device)
    global_step, shown_obs = progress["global_step"], progress["shown_obs"]
    recent_returns = deque(progress["recent_returns"], maxlen=20)
    obs = restart(envs, args, global_step)
    first_step, start_time, stopping = global_step, time.perf_counter(), False
    with tqdm(
        initial=global_step,
        total=num_iterations * rollout_size,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 60,  # a log file gets a line a minute
        disable=rank > 0,
    ) as bar:  # closed, and its line ended, whatever happens
        for iteration in range(first_iteration, num_iterations):
            if args.anneal_lr:
                for group in leader_optimizer.param_groups + follower_optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * (1 - iteration / num_iterations)

            try:
                obs, games = collect_rollout(envs, obs, leader, follower, rollout, args.compile)
                batch = make_batch(rollout, leader, my_args)
                metrics = update(leader, follower, leader_optimizer, follower_optimizer, batch, my_args)
            except FloatingPointError as error:
                last = run_dir / f"checkpoint-{progress['global_step']}.pt"
                fail(f"iteration {iteration + 1}: {error}; the last good checkpoint is {last}")

            global_step += rollout_size
            games = sorted(game for mine in gather(games) for game in mine)
            recent_returns.extend(episodic_return for _, episodic_return, _ in games)
            metrics["losses/explained_variance"] = np.mean(gather(explained_variance(batch.values, batch.returns)))
            metrics["charts/learning_rate"] = follower_optimizer.param_groups[0]["lr"]
            metrics["charts/SPS"] = (global_step - first_step) / (time.perf_counter() - start_time)
            if shown_obs is None:
                shown_obs = batch.obs[-4:].clone()  # the same few for the whole run
            if rank == 0:
                log_iteration(writer, metrics, games, global_step, args)
                if iteration == 0 or global_step % PICTURE_INTERVAL < rollout_size:
                    for tag, picture in leader.pictures(shown_obs.to(device)).items():
                        writer.add_image(tag, picture, global_step, dataformats="HWC")
            mean_return = f"{np.mean(recent_returns):.1f}" if recent_returns else "-"
            bar.set_postfix_str(f"return {mean_return}, {metrics['charts/SPS']:.0f} steps/s", refresh=False)
            bar.update(rollout_size)

            stopping = any(gather(stop.requested))
            # Due if this rollout has crossed a multiple of the interval.
            due = args.checkpoint_interval and global_step % args.checkpoint_interval < rollout_size
            if due or stopping or iteration + 1 == num_iterations:
                if rank == 0:
                    writer.flush()  # no logged point may be lost that the checkpoint counts as done
                progress = {"global_step": global_step, "recent_returns": [*recent_returns], "shown_obs": shown_obs}
                save_checkpoint(run_dir, parts, progress)
                if stopping or iteration + 1 == num_iterations:
                    break
                envs.close()
                # A checkpoint holds no games: every run begins new ones here, as one resumed from it does, which
                # makes resuming exact. (In new environments: some, like BipedalWalker, keep state over a reset.)
                envs = make_envs(my_args)
                obs = restart(envs, args, global_step)
    envs.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return {}  # the first process does the rest

    evaluation = {}
    try:
        if stopping or stop.requested:  # asked for by the last iteration's end, or since
            raise KeyboardInterrupt
        write_state(run_dir / "model.pt", {"leader": leader.state_dict(), "follower": follower.state_dict()})
        if args.eval_episodes:
            evaluation = evaluate(leader, follower, args, device, stop)
            report_evaluation(run_dir, evaluation)
            for statistic in ("mean", "std"):  # logged a step late, so that a resumed run purges and rewrites it
                writer.add_scalar(f"eval/{statistic}_return", evaluation[statistic], global_step + 1)
        print(f"run saved in {run_dir}")
    except KeyboardInterrupt:
        per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        machines = f"--nnodes={num_processes // per_machine} " if num_processes > per_machine else ""
        launcher = f"torchrun {machines}--nproc-per-node={per_machine}" if num_processes > 1 else "python"
        resume = f"{launcher} {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(run_dir))}"
        print(f"stopped at step {global_step}; continue with: {resume}")
    writer.close()
    return evaluation


def parse_args() -> Args:
    """The command line; with --resume or --evaluate, the arguments of that run are the defaults."""
    args = tyro.cli(Args, description=__doc__)
    for option, run in (("--resume", args.resume), ("--evaluate", args.evaluate)):
        if not run and any(word.partition("=")[0] == option for word in sys.argv[1:]):  # e.g. an unset shell variable
            fail(f"{option} needs the folder of a run, not an empty name")
    if run := args.resume or args.evaluate:
        default = dataclasses.replace(read_args(Path(run)), resume=args.resume, evaluate=args.evaluate)
        args = tyro.cli(Args, description=__doc__, default=default)
    return args


# -- Checks and set-up of the process: no part of the algorithm -------------------------------------
DEFAULT_THREADS = torch.get_num_threads()  # as many as there are cores, or as OMP_NUM_THREADS says


def flag(name: str) -> str:
    """A field of `Args` as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def fail(message: str) -> NoReturn:
    """A user's mistake: one line on stderr (of each process that finds it), exit code 1, no traceback."""
    rank = int(os.environ.get("RANK", 0))  # torchrun's
    raise SystemExit(f"error: {message}" + (f" (process {rank})" if rank else ""))


def check_types(args: Args) -> Args:
    """Raises ValueError if a field is not of its type, as tyro does, for callers of `main` and for args.json."""
    for name, hint in get_type_hints(Args).items():
        if get_origin(hint) is tuple:  # in a fork
            continue
        value, kinds = getattr(args, name), get_args(hint) or (hint,)  # the choices of a Literal, or the types
        if isinstance(value, Path) and str in kinds:
            args, value = dataclasses.replace(args, **{name: str(value)}), str(value)
        fits = value in kinds if get_origin(hint) is Literal else type(value) in kinds
        if not fits and not (type(value) is int and float in kinds):
            wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            raise ValueError(f"{flag(name)} must be {wanted}, not {value!r}")
    return args


def check_args(args: Args) -> Args:
    """Refuse, before anything is written, what would only fail later. Returns the arguments as they will be used."""
    try:
        args = check_types(args)
    except ValueError as error:
        fail(str(error))
    at_least_1 = "num_envs num_steps minibatch_size update_epochs total_timesteps reward_delay max_episode_steps"
    not_negative = "seed threads eval_episodes checkpoint_interval ent_coef vf_coef observation_noise distractors"
    positive = "learning_rate clip_coef max_grad_norm target_kl"
    fraction = "gamma gae_lambda"
    at_least_1 += " unroll_steps cg_iterations"
    not_negative += " perception_cost_weight cost_rows leader_value_coef implicit_damping cg_tolerance correction_clamp"
    positive += " unroll_step_size leader_rate_factor feature_scale"
    fraction += " cooperation_weight"
    bounds = [
        (at_least_1, lambda value: value >= 1, "must be at least 1"),
        (not_negative, lambda value: value >= 0, "must not be negative"),
        (positive, lambda value: value > 0, "must be positive"),
        (fraction, lambda value: 0 <= value <= 1, "must lie in [0, 1]"),
    ]
    for names, holds, rule in bounds:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):  # NaN fails every bound
                fail(f"{flag(name)} {rule}, not {value}")
            if value == np.inf:
                fail(f"{flag(name)} must be finite")
    if args.distractors > 84:
        fail(f"--distractors {args.distractors} is more than the 84 rows of pixels of a frame")
    args = check_sprig_args(args)
    if args.threads > (most := max(256, os.cpu_count() or 1)):  # thousands end in a crash
        fail(f"--threads {args.threads} is more than {most}; this machine has {os.cpu_count()} cores")
    if args.seed >= 2**32:
        fail(f"--seed must be less than 2**32, not {args.seed}")
    if args.resume and args.evaluate:
        fail("--resume trains, --evaluate plays; give one of the two")
    if args.evaluate and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("--evaluate plays in one process; start it without torchrun")
    rollout_size = args.num_envs * args.num_steps
    if rollout_size % args.minibatch_size:
        product = f"{args.num_envs} environments x {args.num_steps} steps"
        fail(f"--minibatch-size {args.minibatch_size} does not divide the rollout of {product} = {rollout_size}")
    if "WORLD_SIZE" in os.environ and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        fail("WORLD_SIZE is set, but not all that torchrun sets beside it: start with torchrun, or unset WORLD_SIZE")
    for name in ("num_envs", "minibatch_size"):
        if getattr(args, name) % int(os.environ.get("WORLD_SIZE", 1)):
            fail(f"{flag(name)} {getattr(args, name)} cannot be split evenly over {os.environ['WORLD_SIZE']} processes")
    if args.total_timesteps < rollout_size:
        fail(f"--total-timesteps {args.total_timesteps} is less than one rollout of {rollout_size}")
    samples = rollout_size if args.norm_adv == "rollout" else args.minibatch_size
    if args.norm_adv != "none" and samples < 2:
        fail(f"--norm-adv {args.norm_adv} cannot normalise over a single transition; use more, or set none")
    if args.compile and not args.evaluate:
        compiler, header = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"), "Python.h")
        if not shutil.which(compiler) or not header.exists():
            fail(f"--compile needs a C++ compiler, {compiler}, and {header}: apt install g++ python3-dev")
    try:
        if torch.zeros(1, device=pick_device(args.device)).device.type not in ("cpu", "cuda", "mps"):
            fail(f"--device {args.device} is not a CPU or a GPU")
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {one_line(error)}")
    on_gpu = pick_device(args.device).type == "cuda"
    if args.matmul_precision == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        fail("--matmul-precision bfloat16: this GPU does not compute in bfloat16; leave it out")
    if args.track and not args.evaluate:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            fail(f"--track needs Weights & Biases: pip install wandb ({error})")
    return args


def check_sprig_args(args: Args) -> Args:
    """`check_args` for the flags under SPRIG in `Args`. Returns the arguments with what --paper-literal sets."""
    if args.leader_gradient != "first-order" and args.update != "stackelberg":
        fail(f"--leader-gradient {args.leader_gradient} needs a leader that moves first: set --update stackelberg")
    no_loss, no_attention = args.update in ("joint", "stopped", "separate"), args.attention == "none"
    no_cost = no_loss and not args.perception_cost_in_reward
    cost, method = "perception_cost_weight perception_cost cost_rows", args.leader_gradient
    no_own = f"--update {args.update} has no loss of the leader's own"
    ignored = [  # settings, whether nothing reads them, and why
        ("cooperation_weight leader_objective leader_value_coef", no_loss, no_own),
        (cost, no_cost, no_own),
        (cost, no_attention, "--attention none leaves nothing to pay for"),
        ("cost_rows", args.perception_cost == "concentration", "concentration takes all rows"),
        ("unroll_steps unroll_step_size", method != "unrolled", "it is for --leader-gradient unrolled"),
        ("implicit_damping cg_iterations cg_tolerance", method != "implicit", "it is for --leader-gradient implicit"),
        ("correction_clamp", method == "first-order", "it is for --leader-gradient unrolled or implicit"),
    ]
    for names, unread, reason in ignored:
        for name in names.split():
            if unread and getattr(args, name) != getattr(Args, name):
                fail(f"{flag(name)} would do nothing here: {reason}")
    if args.compile and args.leader_gradient != "first-order":
        fail("--compile has no second derivatives: set --leader-gradient first-order, or leave --compile out")
    if args.perception_cost_in_reward and args.attention == "none":
        fail("--perception-cost-in-reward needs attention to pay for, but --attention is none")
    if args.paper_literal:
        for name, literal in PAPER_LITERAL.items():
            if getattr(args, name) not in (getattr(Args, name), literal):
                fail(f"--paper-literal decides {flag(name)} = {literal}; give one of the two")
        args = dataclasses.replace(args, **PAPER_LITERAL)
    return args


def set_matmul_precision(precision: str) -> None:
    """For all matrix products in float32 from here on; on AMD processors without AMX "high" means "medium".

    "medium" lets oneDNN compute them, in bfloat16 if the CPU has AMX, else in float32: on AMD processors up to twice
    as fast as MKL, which is slow there. For small products MKL is faster nevertheless.
    """
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpuinfo.read_text() if cpuinfo.exists() else ""
    precision = "high" if precision == "bfloat16" else precision  # the encoder sees to its own
    if precision == "high" and "AuthenticAMD" in cpu and "amx" not in cpu:
        precision = "medium"  # on a GPU the same as "high"
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"  # convolutions


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # by its number: torchrun gives each process a GPU of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that train together: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(mine) -> list:
    """What each process holds, in the order of ranks."""
    everyone = [mine] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    return everyone


def average_(tensors: list[torch.Tensor]) -> None:
    """Replace tensors by their means over all processes; one process alone has them already."""
    if dist.is_initialized():
        flat = flatten(tensors)
        dist.all_reduce(flat)
        flat /= processes()[1]
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors: faulting it in anew takes a tenth of an update's time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library, with other habits
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, size in ((-1, 2**31 - 1), (-2, 2**26)):  # trim threshold, top pad
            mallopt(parameter, size)
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # mmap threshold; older versions take no more than 32 MiB


def prepare_compiler(device: torch.device) -> None:
    """What `torch.compile` needs here: to trace derivatives, but not `descend`; no warnings of what is meant; buffers
    kept for a second backward; and on a CPU kernels that are called from C++.
    """
    global descend
    from torch._dynamo import config as tracing
    from torch._functorch import config
    from torch._inductor import config as code

    if hasattr(tracing, "trace_autograd_ops"):  # older versions cut the step at each derivative
        tracing.trace_autograd_ops = True
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # named_parameters
    config.donated_buffer = False
    descend = torch.compiler.disable(descend)  # traced, it would be traced anew for each learning rate
    torch.compiler.reset()  # graphs of an earlier run in this process: only so many are kept
    code.cpp_wrapper = device.type == "cpu"  # calls from Python cost small networks a tenth of a step, and more acting


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:  # in an evaluation or before training, which ends in its own way (see StopSignal)
        fail("interrupted; nothing was saved")
