"""SPRIG on state vectors: perception leads, policy follows in a Stackelberg game.

    python sprig_continuous.py --env-id HalfCheetah-v5

On each minibatch the leader (perception) ascends its utility while the follower (policy and value) stays; then the
follower descends PPO's loss on the features that it is shown now, while the leader stays: `stackelberg_step`.

Paper: Martinez-Lopez, Chen, Lu, "SPRIG: Stackelberg Perception-Reinforcement Learning with Internal Game Dynamics",
arXiv 2502.14264. Equations and lines (of Algorithm 1) have its numbers. DEVIATION: not as printed there, see that row
of docs/paper.md. The paper knows pixels only; here the observation's entries take the place of the image's locations.

Reaches in 1M steps (mean of n = 5 seeds, 10 games each): HalfCheetah-v5 2873, Hopper-v5 2360, Walker2d-v5 3019,
InvertedPendulum-v5 1000; by the interquartile mean 0.97 [0.89, 1.19] of what PPO reaches.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import logging
import math
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, get_type_hints

if __name__ == "__main__":  # before torch is loaded
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle OpenMP threads soon stop spinning and free their cores
    while os.open(os.devnull, os.O_RDWR) < 3:  # no file of the run may take the place of a closed stderr (cron, 2>&-)
        pass

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_, get_total_norm, parameters_to_vector
from torch.utils.tensorboard import SummaryWriter

# ==== Arguments ===================================================================================
Count = Annotated[int, (1, 1e12)]  # (low, high): bounds that Args checks
Amount = Annotated[int, (0, 1e12)]
Weight = Annotated[float, (0, 1e30)]
Positive = Annotated[float, (1e-12, 1e30)]
Threshold = Annotated[float | None, (1e-12, 1e30)]
Fraction = Annotated[float, (0, 1)]


@dataclass
class RunArgs:
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seed of the networks, the actions, the minibatches and the games
    total_timesteps: Count = 1_000_000  # agent steps over all environments, rounded down to whole rollouts
    run_dir: str = ""  # folder of the run, new or empty ('': runs/<env>__<script>__<seed>__<time>)
    device: str = "auto"  # "cpu", "cuda", "cuda:1", ...; "auto" takes a CUDA GPU if there is one
    threads: Annotated[int, (0, 256)] = 1  # CPU threads; one is usually the fastest (0: as many as there are cores)
    eval_episodes: Amount = 10  # whole games played after training, on fresh seeds (0: none)
    eval_greedy: bool = False  # take the most probable action in the evaluation instead of sampling it
    checkpoint_interval: Amount = 100_000  # agent steps between checkpoints; games restart at each (0: only at the end)
    resume: Path | None = None  # folder of a run to continue, with its own arguments
    evaluate: Path | None = None  # folder of a run to evaluate instead of training
    track: bool = False  # mirror TensorBoard to Weights & Biases (needs `pip install wandb`)


@dataclass
class EnvironmentArgs:
    env_id: str = "HalfCheetah-v5"  # any Gymnasium id of vectors, dm_control/<domain>-<task>-v0, module:Name-v0
    num_envs: Count = 1  # environments side by side, N
    max_episode_steps: Amount = 0  # steps after which an episode is truncated (0: the task's own limit)
    norm_obs: bool = True  # the leader sees entries with mean 0 and variance 1 (running), clipped to [-10, 10]
    norm_rewards: bool = True  # the learner's rewards are divided by the discounted return's standard deviation
    clip_rewards: bool = True  # clip the rewards that the learner sees to [-10, 10]; logged returns are always raw
    observation_noise: Weight = 0.0  # robustness: std of noise on each normalised entry (--no-norm-obs: raw entry)
    distractors: Amount = 0  # robustness: number of standard normal noise entries appended
    reward_delay: Count = 1  # robustness: pay the learner once in this many steps, and when its episode ends


@dataclass
class PpoArgs:
    num_steps: Count = 2048  # steps of each environment per rollout, T
    minibatch_size: Annotated[int, (2, 1e12)] = 64  # transitions per gradient step, B
    update_epochs: Count = 10  # passes over each rollout
    learning_rate: Positive = 3e-4  # Adam's step size
    anneal_lr: bool = True  # let the step size fall linearly to 0
    gamma: Fraction = 0.99  # discount, γ
    gae_lambda: Fraction = 0.95  # λ of generalised advantage estimation
    norm_adv: Literal["rollout", "minibatch", "none"] = "minibatch"  # over what the advantages are normalised
    clip_coef: Positive = 0.2  # ε: the probability ratio is clipped to [1 - ε, 1 + ε]
    clip_value_loss: bool = True  # clip the value's change to ε as well
    ent_coef: Weight = 0.0  # weight of the entropy bonus, β
    vf_coef: Weight = 0.25  # weight of the mean squared value error (which has no further factor 1/2)
    max_grad_norm: Positive = 0.5  # largest gradient norm of a step
    target_kl: Threshold = 0.015  # stop a rollout's epochs once the mean approximate KL of one exceeds this


@dataclass
class SprigArgs:
    cooperation_weight: Fraction = 0.7  # α of Eq. (8): the leader's weight on the return; 1 - α weighs its cost
    perception_cost_weight: Weight = 1e-4  # λ_c of Eq. (9)
    perception_cost: Literal["entropy", "concentration", "l1"] = "entropy"  # spread rows, crowded columns or as printed
    cost_rows: Amount = 24  # query rows drawn per layer to estimate entropy or l1 (0: all; concentration: always all)
    leader_objective: Literal["clipped", "log-prob"] = "clipped"  # PPO's surrogate, or mean(log π · Â) as in line 10
    leader_gradient: Literal["first-order", "unrolled", "implicit"] = "first-order"
    """Algorithm 1's partial derivative; or the total one: through a step of the follower, or its best response"""
    leader_rate_factor: Positive = 1.0  # the leader's step size over --learning-rate (measured with --update commit: 3)
    leader_value_coef: Weight = 0.0  # weight of the squared value error in the leader's loss (Algorithm 1: none)
    attention: Literal["gated", "figure4", "none"] = "gated"  # x + γ·attention(x), or attention(x) as in Figure 4
    feature_scale: Positive = 0.25  # factor on the features: sets how far an Adam step moves the policy
    update: Literal["joint", "stopped", "separate", "simultaneous", "stackelberg", "commit"] = "stackelberg"
    """from PPO's step to SPRIG's, each adds one change; commit: the leader takes a pass alone, then the follower all"""
    leader_max_kl: Positive = 0.02  # commit: the pass ends where a minibatch has this KL to the old policy
    perception_cost_in_reward: bool = False  # learn from R - λ_c·C_θ(s), the reward in Eq. (13)
    paper_literal: bool = False  # the paper as printed: rows 1, 2, 4, 5, 10 and 11 of docs/paper.md


# What --paper-literal sets. Line 11 puts its α = 0.7 on the cost, 0.3 on the return.
LITERAL = dict(cooperation_weight=0.3, perception_cost="l1", leader_objective="log-prob", leader_value_coef=0.0,
               attention="figure4", feature_scale=1.0, leader_gradient="first-order", update="stackelberg")  # fmt: skip


@dataclass
class Args(SprigArgs, PpoArgs, EnvironmentArgs, RunArgs):
    def __post_init__(self):
        """Raises ValueError, one line, on values that cannot work."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for low, high in getattr(hint, "__metadata__", ()):
                if value is not None and not low <= value <= high:  # NaN fails every bound
                    raise ValueError(f"--{name.replace('_', '-')} must be in [{low:g}, {high:g}], not {value}")
        rollout = self.num_envs * self.num_steps
        if rollout % self.minibatch_size:
            raise ValueError(f"--minibatch-size {self.minibatch_size} does not divide the rollout of {rollout} steps")
        if self.total_timesteps < rollout:
            raise ValueError(f"--total-timesteps {self.total_timesteps} is less than one rollout of {rollout} steps")
        if self.evaluate is not None and (self.resume is not None or not self.eval_episodes):
            raise ValueError("--evaluate plays: leave out --resume, and let --eval-episodes be at least 1")
        if self.leader_gradient != "first-order" and self.update != "stackelberg":
            raise ValueError(f"--leader-gradient {self.leader_gradient} needs --update stackelberg")
        if self.paper_literal:
            for name, literal in LITERAL.items():
                if getattr(self, name) not in (getattr(Args, name), literal):  # the default counts as not given
                    raise ValueError(f"--paper-literal sets --{name.replace('_', '-')} {literal}; give one of the two")
                setattr(self, name, literal)


def fail(message: object) -> NoReturn:
    """A user's mistake, or a fault of the task or the machine: one line on stderr, exit code 1, no traceback."""
    raise SystemExit(f"error: {' '.join(str(message).split())}")


def say(text: str, stream=None) -> None:
    """Print, on stderr by default. No run ends because a terminal is gone or a pipe closed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end="", file=stream or sys.stderr, flush=True)


# ==== Environment =================================================================================
def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment, dictionaries flattened (see Task). Ends the run if it cannot be made or does not fit."""
    module = "shimmy:" if args.env_id.startswith("dm_control/") else ""  # the package that registers DM Control's tasks
    options = {"max_episode_steps": args.max_episode_steps or None, "disable_env_checker": True}
    logging.getLogger("absl").setLevel(logging.ERROR)  # DM Control's, as is the search for a display
    warnings.filterwarnings("ignore", module="glfw")
    try:
        try:
            env = gym.make(module + args.env_id, render_mode=render_mode, **options)
        except TypeError:  # some constructors have no such argument
            env = gym.make(module + args.env_id, **options)
    except Exception as error:  # Gymnasium's own suggest a near name or what to install
        hint = "packages: requirements.txt; pixels: sprig_atari.py"
        fail(f"--env-id {args.env_id} cannot be made ({hint}): {type(error).__name__}: {error}")
    if mujoco := sys.modules.get("mujoco"):  # its warnings go to stderr, not into a file MUJOCO_LOG.TXT
        mujoco.set_mju_user_warning(lambda message: "deprecated" in message or say(f"warning: MuJoCo: {message}\n"))
    shown, actions = env.observation_space, env.action_space
    parts = shown.values() if isinstance(shown, gym.spaces.Dict) else [shown]
    # No images: three axes, or two of bytes.
    fits = all(isinstance(part, gym.spaces.Box) and len(part.shape) + (part.dtype == np.uint8) < 3 for part in parts)
    if fits and isinstance(shown, gym.spaces.Dict):
        env = gym.wrappers.FlattenObservation(env)
    if not fits or len(env.observation_space.shape) != 1 or not env.observation_space.shape[0]:
        fail(f"--env-id {args.env_id} shows {shown}, not a vector: wrap it; for pixels there is sprig_atari.py")
    vector = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1 and actions.dtype.kind == "f"
    if not (vector and actions.shape[0] or isinstance(actions, gym.spaces.Discrete) and actions.start == 0):
        fail(f"--env-id {args.env_id} takes actions from {actions}; only real vectors and discrete ones from 0 will do")
    return Task(env)


class Task(gym.Wrapper):
    """Observations float32 (n,), Box actions clipped to their bounds, no info (slow to collect). With `one_game`, a
    game that is over idles. Ends the run on an observation that is not finite, or of another shape than declared."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.one_game, self.over, self.bounds = False, False, None
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
        if isinstance(env.action_space, gym.spaces.Box):  # unbounded: the policy is a Gaussian
            self.action_space = gym.spaces.Box(-np.inf, np.inf, env.action_space.shape, np.float32)
            self.bounds = env.action_space.low, env.action_space.high

    def reset(self, *, seed=None, options=None):
        if self.over and self.one_game:
            return np.zeros(self.observation_space.shape, np.float32), {}
        return self.checked(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action):
        if self.over and self.one_game:
            return np.zeros(self.observation_space.shape, np.float32), 0.0, False, False, {}
        action = action if self.bounds is None else action.clip(*self.bounds)
        obs, reward, terminated, truncated, _ = self.env.step(action)
        reward = np.asarray(reward, float).item()
        if not np.isfinite(reward):
            fail(f"--env-id {self.spec.id}: the reward {reward} is not finite")
        self.over = bool(terminated or truncated)
        return self.checked(obs), reward, bool(terminated), bool(truncated), {}

    def checked(self, obs) -> np.ndarray:
        with np.errstate(over="ignore"):  # a finite float64 may overflow
            entries = np.asarray(obs, np.float32)
        if entries.shape != self.observation_space.shape or not np.isfinite(entries).all():
            fail(f"--env-id {self.spec.id} shows {obs}, not {self.observation_space.shape[0]} finite numbers")
        return entries


def env_protocol(args: Args) -> dict:
    """How the task is set: what two results must share to be comparable. Ends the run on an id that does not fit."""
    env = make_env(args)
    env.close()
    shown = ("env_id", "norm_obs", "norm_rewards", "clip_rewards", "observation_noise", "distractors", "reward_delay")
    return {name: getattr(args, name) for name in shown} | {
        "time_limit": env.spec.max_episode_steps or "the task's own, if any",  # DM Control's own holds where it is less
        "observation": f"{env.observation_space.shape[0]} entries",
        "action": str(env.env.action_space),
        "autoreset": "same step",
    }


class Disturbed(gym.vector.VectorWrapper):
    """The robustness switches: noise and distractors in what is observed, delay in what is paid. Returns in
    `info["episode"]` stay what they are. The noise starts anew, from the games' seeds, at each reset. It is relative to
    each entry's scale, which only the leader's normaliser knows: so with noise an observation has two rows (2, n), the
    entries, and what the leader adds once they are normalised."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        super().__init__(envs)
        self.args = args
        size = envs.single_observation_space.shape[0] + args.distractors
        shape = (2, size) if args.observation_noise else (size,)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        self.random, self.unpaid, self.steps = np.random.default_rng(seed), np.zeros(len(obs)), np.zeros(len(obs), int)
        return self.disturb(obs), info

    def step(self, actions):
        obs, rewards, terminations, truncations, info = self.env.step(actions)
        if self.args.reward_delay > 1:
            unpaid, steps = self.unpaid + rewards, self.steps + 1
            over = terminations | truncations
            due = over | (steps % self.args.reward_delay == 0)
            rewards, self.unpaid, self.steps = unpaid * due, unpaid * ~due, steps * ~over
        if "final_obs" in info:
            info["final_obs"] = [None if x is None else self.disturb(x) for x in info["final_obs"]]
        return self.disturb(obs), rewards, terminations, truncations, info

    def disturb(self, obs: np.ndarray) -> np.ndarray:
        """(..., n) -> (..., n + distractors), or with noise (..., 2, n + distractors)."""
        if self.args.distractors:
            shape = (*obs.shape[:-1], self.args.distractors)
            obs = np.concatenate([obs, self.random.standard_normal(shape, dtype=np.float32)], axis=-1)
        if self.args.observation_noise:
            noise = self.args.observation_noise * self.random.standard_normal(obs.shape, dtype=np.float32)
            obs = np.stack([obs, noise], axis=-2)
        return obs


def make_envs(args: Args, num_envs: int | None = None, render_mode: str | None = None) -> gym.vector.VectorEnv:
    """`num_envs` environments (default: --num-envs): obs (N, n) float32 (with noise (N, 2, n), see Disturbed), rewards
    (N,) raw, autoreset within the step."""
    tasks = [lambda: make_env(args, render_mode)] * (num_envs or args.num_envs)
    envs = gym.vector.SyncVectorEnv(tasks, autoreset_mode="SameStep")
    return Disturbed(gym.wrappers.vector.RecordEpisodeStatistics(envs), args)


def env_seeds(seed: int, *stream: int, num_envs: int) -> list[int]:
    """N seeds, hashed: with seed, seed + 1, ... the runs of neighbouring seeds would share games. The first number of
    `stream` says what for: 0 training (then the step), 1 evaluation, 2 watch.py, 3 benchmark/."""
    return (np.random.SeedSequence([seed, *stream]).generate_state(num_envs) >> 1).tolist()  # 31 bits: a C int


def begin_games(args: Args, *stream: int, num_envs: int | None = None) -> tuple[gym.vector.VectorEnv, np.ndarray]:
    """New games and their first observations. All that is random starts anew here, from (seed, *stream). Training
    begins new games at step 0 and at each checkpoint: so a checkpoint holds only what was learnt, and a run resumed
    from it equals, bit for bit, one that went on from it."""
    seeds = env_seeds(args.seed, *stream, num_envs=num_envs or args.num_envs)
    torch.manual_seed(seeds[0])
    np.random.seed(seeds[0])  # noqa: NPY002, some tasks draw from it
    random.seed(seeds[0])
    envs = make_envs(args, num_envs)
    return envs, envs.reset(seed=seeds)[0]


# ==== Leader ======================================================================================
class RunningMoments(nn.Module):
    """Mean and variance of all that was observed so far (Chan et al. 1979). Buffers, so every checkpoint has them."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def observe(self, x: torch.Tensor) -> None:
        """Take in x (B, *shape)."""
        var, mean = torch.var_mean(x, 0, correction=0)
        weight, shift = len(x) / (self.count + len(x)), mean - self.mean  # weight: the share of the new values
        self.mean += weight * shift
        self.var += weight * (var - self.var + (1 - weight) * shift**2)  # last term: the means differ
        self.count += len(x)


class Normaliser(nn.Module):
    """Puts observations and rewards on a common scale, by the statistics of the rollouts so far.
    Observations: each entry's mean and variance over the rollouts before this one (in the first: 0 and 1), so that a
    policy is updated on just what it saw when it acted; OpenAI's baselines update the statistics at each step.
    Rewards: divided by the standard deviation, up to and with this rollout, of the discounted sum of an episode's
    rewards so far (as in OpenAI's baselines); their mean is kept."""

    def __init__(self, num_entries: int, args: Args):
        super().__init__()
        self.norm_obs, self.gamma = args.norm_obs, args.gamma
        self.entries, self.discounted_return = RunningMoments(num_entries), RunningMoments()
        self.running = 0.0  # then (N,): discounted sums of the running episodes; 0 where all environments begin anew

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (B, n) -> (B, n) normalised and clipped; the noise of obs (B, 2, n) comes on top."""
        obs, noise = obs.unbind(1) if obs.ndim == 3 else (obs, None)
        if self.norm_obs:
            obs = ((obs - self.entries.mean) * (self.entries.var + 1e-8).rsqrt()).clamp(-10, 10)
        return obs if noise is None else obs + noise

    @torch.no_grad()
    def observe(self, obs: torch.Tensor) -> None:
        """Take in the observations (B, n) or (B, 2, n) of a rollout; they count from the next one on."""
        self.entries.observe(obs[:, 0] if obs.ndim == 3 else obs)

    @torch.no_grad()
    def scale_rewards(self, rewards: torch.Tensor, dones: torch.Tensor) -> torch.Tensor:
        """rewards, dones (T, N) -> (T, N): takes the rewards in, then returns them scaled."""
        history = []
        for reward, done in zip(rewards, dones):
            history.append(self.running * self.gamma + reward)  # (N,)
            self.running = history[-1] * (1 - done)
        self.discounted_return.observe(torch.cat(history))
        return rewards * (self.discounted_return.var + 1e-8).rsqrt()


def init_layer(layer: nn.Module, std: float = 2**0.5) -> nn.Module:
    """Orthogonal weights, zero bias: the usual initialisation of PPO."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class AttentionBlock(nn.Module):
    """Self-attention over n tokens (Figure 4): (B, n, C) -> (B, n, C)."""

    def __init__(self, channels: int, gated: bool):
        super().__init__()
        # DEVIATION: row 4, C/4 for queries and keys: Figure 4's C/8 would be 2 channels
        self.widths = [channels // 4, channels // 4, channels]
        self.project = nn.Linear(channels, sum(self.widths))  # Figure 4's three 1x1 convolutions at once
        # DEVIATION: row 4, x + γ·attention(x), not attention(x), which averages the map away
        self.gate = nn.Parameter(torch.zeros(())) if gated else None

    def forward(self, x: torch.Tensor, num_rows: int | None = None):
        """Returns (output, weights): weights (B, n, n), each row a distribution, or with 0 < `num_rows` < n as many of
        these rows, drawn at random, the same for the whole batch. What replaces attention may return None for them."""
        n = x.shape[1]
        query, key, value = self.project(x).split(self.widths, dim=-1)  # (B, n, C/4), (B, n, C/4), (B, n, C)
        query, key = query * query.shape[-1] ** -0.5, key.transpose(1, 2)
        if n <= 100 or x.is_cuda:
            weights = torch.bmm(query, key).softmax(-1)  # (B, n, n); bmm, as the gradient of @ takes longer
            attended = torch.bmm(weights, value)  # (B, n, C)
        else:  # 8 samples at a time, whose weights stay in a CPU's cache
            weights, pieces = None, zip(query.split(8), key.split(8), value.split(8))
            attended = torch.cat([torch.bmm(torch.bmm(q, k).softmax(-1), v) for q, k, v in pieces])
        output = attended if self.gate is None else torch.addcmul(x, self.gate, attended)
        if num_rows and num_rows < n:  # computed again: the gradient of a part of all n rows takes longer
            weights = torch.bmm(query[:, torch.randperm(n, device=x.device)[:num_rows]], key).softmax(-1)
        elif weights is None and num_rows is not None:
            weights = torch.bmm(query, key).softmax(-1)
        return output, weights


class Leader(nn.Module):
    """Perception, θ. Each entry of the observation becomes a token of C = 16 channels, to which K = 3 layers (linear,
    LayerNorm, attention of entries to entries) add. obs (B, n) or (B, 2, n) (see Disturbed) -> features (B, n·C). With
    `num_rows` given, (features, attention): K = 3 tensors (B, n, n), or rows of them (see AttentionBlock)."""

    def __init__(self, observation_space: gym.spaces.Box, args: Args):
        super().__init__()
        num_entries, channels = observation_space.shape[-1], 16
        self.normaliser = Normaliser(num_entries, args)
        self.token_scale = nn.Parameter(torch.randn(num_entries, channels))  # token = entry · scale + bias
        self.token_bias = nn.Parameter(torch.zeros(num_entries, channels))
        self.linears, self.norms, self.blocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.layer_gates = nn.ParameterList()
        for _ in range(3):
            self.linears.append(init_layer(nn.Linear(channels, channels)))
            self.norms.append(nn.LayerNorm((num_entries, channels)))
            block = AttentionBlock(channels, args.attention == "gated") if args.attention != "none" else None
            self.blocks.append(block)
            # DEVIATION: row 4, x + g·layer(x), not layer(x), with which Walker2d was not learnt (docs/paper.md)
            self.layer_gates.append(None if args.attention == "figure4" else nn.Parameter(torch.zeros(())))
        # DEVIATION: row 4, ReLU after LayerNorm: without it only LayerNorm and attention are nonlinear
        self.activation = nn.Identity() if args.attention == "figure4" else nn.ReLU()
        self.num_features, self.feature_scale = num_entries * channels, args.feature_scale

    def forward(self, obs: torch.Tensor, num_rows: int | None = None):
        entries, attention = self.normaliser(obs), []  # (B, n)
        x = torch.addcmul(self.token_bias, entries[..., None], self.token_scale)  # (B, n, C)
        for linear, norm, block, gate in zip(self.linears, self.norms, self.blocks, self.layer_gates):
            layer = self.activation(norm(linear(x)))  # (B, n, C)
            if block is not None:
                layer, weights = block(layer, num_rows)
                attention += [weights] if weights is not None else []
            x = layer if gate is None else torch.addcmul(x, gate, layer)
        # DEVIATION: row 11, scaled down: hundreds of features of unit scale make each of Adam's steps a leap
        features = self.feature_scale * x.flatten(1)  # (B, n·C)
        return features if num_rows is None else (features, attention)

    @torch.no_grad()
    def look(self, obs: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
        """What attention does on `obs`: by tag the gates, and the entropies as fractions of the largest; and a picture
        (8·n, K·8·n) in [0, 1], each layer's mean attention of entries (rows) to entries (white: twice the uniform)."""
        info = {f"leader/{name}": gate.item() for name, gate in self.named_parameters() if gate.ndim == 0}
        tiles = [torch.zeros(len(self.token_bias), 0)]
        for k, weights in enumerate(self(obs, num_rows=0)[1], 1):  # (B, n, n)
            info[f"leader/attention_entropy_{k}"] = perception_cost([weights], "entropy").mean().item()
            tiles.append((weights.mean(0).cpu() * weights.shape[-1] / 2).clamp(0, 1))
        return info, torch.cat(tiles, -1).repeat_interleave(8, 0).repeat_interleave(8, 1)


# ==== Follower ====================================================================================
class Follower(nn.Module):
    """Policy and value heads, φ. features (B, F) -> policy, value (B,). The policy is given by its logits (B, A), or
    for actions that are vectors by mean and log standard deviation (B, 2, A), the latter a parameter that does not
    depend on the state."""

    def __init__(self, num_features: int, action_space: gym.spaces.Discrete | gym.spaces.Box):
        super().__init__()
        continuous = isinstance(action_space, gym.spaces.Box)
        size = action_space.shape[0] if continuous else int(action_space.n)

        def head(outputs: int, std: float) -> nn.Sequential:
            hidden = [init_layer(nn.Linear(num_features, 64)), nn.Tanh(), init_layer(nn.Linear(64, 64)), nn.Tanh()]
            return nn.Sequential(*hidden, init_layer(nn.Linear(64, outputs), std))

        self.actor, self.critic = head(size, std=0.01), head(1, std=1.0)
        self.log_std = nn.Parameter(torch.zeros(size)) if continuous else None

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        policy = self.actor(features)  # (B, A)
        if self.log_std is not None:
            policy = torch.stack([policy, self.log_std.expand_as(policy)], dim=1)  # (B, 2, A)
        return policy, self.critic(features).squeeze(-1)


def action_distribution(logits: torch.Tensor) -> Distribution:
    if logits.ndim == 2:
        return Categorical(logits=logits, validate_args=False)  # validation would wait for the GPU
    mean, log_std = logits.unbind(1)  # (B, 2, A) -> (B, A) each, see Follower
    return Independent(Normal(mean, log_std.exp(), validate_args=False), 1, validate_args=False)


# ==== Rollout =====================================================================================
class Batch(NamedTuple):
    """Transitions, flat: what the losses need of a rollout."""

    obs: torch.Tensor  # (B, *observation)
    actions: torch.Tensor  # (B,) or (B, A)
    logprobs: torch.Tensor  # (B,), like the rest
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, Eq. 16). All tensors (T, N) float;
    `next_values[t]` is V of the observation that action t truly led to, before any reset. A termination zeroes the
    bootstrap, either end cuts the trace. Returns (advantages, returns), both (T, N)."""
    deltas = rewards + gamma * next_values * (1 - terminations) - values  # (T, N)
    decay = gamma * gae_lambda * (1 - dones)  # (T, N)
    advantages, trace = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        advantages[t] = trace = deltas[t] + decay[t] * trace
    return advantages, advantages + values


@torch.no_grad()
def collect_rollout(envs, obs: np.ndarray, leader: Leader, follower: Follower, args: Args):
    """Play T steps of N environments from `obs` (N, ...). Returns (batch of T·N transitions, next `obs`,
    games): of each whole game that ended the steps into the rollout, its raw return and its length."""
    device = next(follower.parameters()).device
    steps, paid, cuts, games = [], [], [], []
    with torch.inference_mode():
        for t in range(args.num_steps):
            seen = torch.from_numpy(obs).to(device)  # (N, ...)
            logits, values = follower(leader(seen))
            actions = action_distribution(logits).sample()
            steps.append((seen, actions, logits, values))
            obs, rewards, terminations, truncations, info = envs.step(actions.cpu().numpy())
            paid.append((rewards, terminations, terminations | truncations))
            for row in np.flatnonzero(truncations & ~terminations):  # its next observation is not the next game's first
                final_obs = torch.from_numpy(info["final_obs"][row][None]).to(device)
                cuts.append((t, row, follower(leader(final_obs))[1].squeeze(0)))
            for row in np.flatnonzero(info.get("_episode", ())):
                games.append((t + 1, float(info["episode"]["r"][row]), int(info["episode"]["l"][row])))
        last_value = follower(leader(torch.from_numpy(obs).to(device)))[1]
    # Stacked outside the inference mode, as its own tensors cannot be learnt from.
    seen, actions, logits, values = (torch.stack(column) for column in zip(*steps))  # (T, N, ...)
    rewards, terminations, dones = torch.from_numpy(np.array(paid, dtype=np.float32)).to(device).unbind(1)  # (T, N)
    next_values = torch.cat([values[1:], last_value[None]])
    for t, row, value in cuts:
        next_values[t, row] = value
    if args.norm_rewards:
        rewards = leader.normaliser.scale_rewards(rewards, dones)
    if args.clip_rewards:
        rewards = rewards.clamp(-10, 10)
    if args.perception_cost_in_reward:  # R - λ_c C_θ(s), as in Eq. (13)
        rewards -= args.perception_cost_weight * torch.stack([perceive(leader, x, args)[1] for x in seen])
    advantages, returns = compute_gae(rewards, values, next_values, terminations, dones, args.gamma, args.gae_lambda)
    if args.norm_adv == "rollout":
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logprobs = action_distribution(logits.flatten(0, 1)).log_prob(actions.flatten(0, 1)).view_as(values)
    return Batch(*(x.flatten(0, 1) for x in (seen, actions, logprobs, values, advantages, returns))), obs, games


# ==== Losses ======================================================================================
def perception_cost(attention: list[torch.Tensor], kind: str) -> torch.Tensor:
    """What the leader pays for its attention, C_θ of Eq. (9) before λ_c: in [0, 1].
    attention: K row-stochastic tensors (B, n_k, n_k) -> (B,), the mean over layers (K = 0: scalar 0). For "entropy"
    and "l1", means over query rows, a sample of rows (B, r, n_k) gives an unbiased estimate. Raises ValueError on an
    unknown kind, and on sampled rows for "concentration"."""
    costs = []
    for weights in attention:
        n = weights.shape[-1]
        # DEVIATION: row 2, costs with a gradient beside the printed norm, which has none
        if kind == "entropy":  # mean_i H(A_i) / log n: 1 for uniform rows, 0 for one-hot rows
            cost = -(weights * (weights + 1e-30).log()).sum(-1).mean(-1) / max(math.log(n), 1e-30)
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


def policy_objective(log_ratio, advantages, clip_coef):
    """PPO's clipped surrogate, to maximise: (B,) log ratios and advantages -> (B,)."""
    ratio = log_ratio.exp()
    return torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def leader_loss(logits, values, cost, batch: Batch, args: Args):
    """-u_L (Eq. 8, 10), plus the value error if that has a weight. logits: the policy as the follower gives it, B rows;
    values (B,); cost (B,): C_θ(s) before λ_c. Returns (loss, info), scalars."""
    logprobs = action_distribution(logits).log_prob(batch.actions)  # (B,)
    log_ratio = logprobs - batch.logprobs  # (B,)
    if args.leader_objective == "clipped":
        # DEVIATION: row 5, PPO's trust region for the leader too: line 10 is unbounded where Â < 0
        policy_term = policy_objective(log_ratio, batch.advantages, args.clip_coef).mean()
    else:
        policy_term = (logprobs * batch.advantages).mean()  # line 10
    alpha, mean_cost = args.cooperation_weight, cost.mean()
    # DEVIATION: row 1, α on the return as in Eq. (8); line 11 puts it on the cost
    utility = alpha * policy_term - (1 - alpha) * args.perception_cost_weight * mean_cost  # Eq. (8), (9)
    loss = -utility + args.leader_value_coef * ((values - batch.returns) ** 2).mean()  # Eq. (10)
    info = {"leader/utility": utility, "leader/policy_term": policy_term, "leader/perception_cost": mean_cost}
    info["leader/approx_kl"] = (log_ratio.expm1() - log_ratio).mean()
    return loss, {tag: x.detach() for tag, x in info.items()}


def follower_loss(logits, values, batch: Batch, args: Args):
    """PPO's loss: -L_CLIP + vf_coef * L_V - ent_coef * H. logits: the policy as the follower gives it, B rows; values
    (B,). Returns (loss, info), scalars."""
    policy = action_distribution(logits)
    log_ratio = policy.log_prob(batch.actions) - batch.logprobs  # (B,)
    policy_loss = -policy_objective(log_ratio, batch.advantages, args.clip_coef).mean()
    value_error = (values - batch.returns) ** 2  # (B,)
    if args.clip_value_loss:
        clipped = batch.values + (values - batch.values).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, (clipped - batch.returns) ** 2)
    value_loss, entropy = value_error.mean(), policy.entropy().mean()
    # DEVIATION: row 6, line 17's C_θ left out: it does not depend on φ
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    change = log_ratio.expm1()  # (B,) of the probability ratio from 1
    info = {"losses/policy_loss": policy_loss, "losses/value_loss": value_loss, "losses/entropy": entropy}
    info["losses/approx_kl"] = (change - log_ratio).mean()  # http://joschu.net/blog/kl-approx.html
    info["losses/clipfrac"] = (change.abs() > args.clip_coef).float().mean()
    return loss, {tag: x.detach() for tag, x in info.items()}


# ==== Update ======================================================================================
# First the total derivative (--leader-gradient), to be skipped on a first reading: go on at `perceive`.
def conjugate_gradients(product, v: torch.Tensor, iterations: int, tolerance: float) -> torch.Tensor:
    """Solve A x = v for symmetric A, given as product(x) = A x (Hestenes, Stiefel 1952). Returns x. Stops at a residual
    of `tolerance` · ‖v‖, and where pᵀAp <= 0: along such a direction the follower has no minimum."""
    x, residual, direction = torch.zeros_like(v), v, v
    start = squared = v.dot(v)
    for _ in range(iterations):
        curved = product(direction)  # A p
        curvature = direction.dot(curved)
        if squared <= tolerance**2 * start or not curvature > 0:
            break
        x, residual = x + squared / curvature * direction, residual - squared / curvature * curved
        before, squared = squared, residual.dot(residual)
        direction = residual + squared / before * direction
    return x


def leader_gradient(leader_loss_fn, follower_loss_fn, theta, phi, method, *, step_size=0.02, num_steps=1,
                    damping=50.0, cg_iterations=10, cg_tolerance=1e-3, clamp=1.0):  # fmt: skip
    """Gradient of the leader's loss f_L for each tensor of theta, to descend: a list of tensors. Both functions map
    (theta, phi), lists of tensors, to a scalar to minimise. The defaults are what training uses. Methods:
    - "first-order": ∂f_L/∂θ, Algorithm 1. The follower's answer to θ is not anticipated.
    - "unrolled": d/dθ f_L(θ, φ⁺(θ)), where φ⁺ is φ after `num_steps` steps of size `step_size` down ∇_φ f_F.
    - "implicit": ∂f_L/∂θ - M (H + damping·I)⁻¹ ∂f_L/∂φ with H = ∇²_φφ f_F, M = ∇²_θφ f_F: Eq. (6) by the implicit
      function theorem, the solve by conjugate gradients (`cg_iterations`, `cg_tolerance` of the residual's norm).
    The correction, total minus first-order gradient, is at most `clamp` times as long as the first-order gradient
    (None: no bound). Raises ValueError on an unknown method."""
    theta, phi = ([x if x.requires_grad else x.detach().requires_grad_() for x in player] for player in (theta, phi))

    def grad(output, inputs, **options):  # zeros for inputs that the output does not depend on
        if not output.requires_grad:
            return [torch.zeros_like(x) for x in inputs]
        return list(torch.autograd.grad(output, inputs, retain_graph=True, materialize_grads=True, **options))

    loss = leader_loss_fn(theta, phi)
    first_order = grad(loss, theta)
    if method == "first-order":
        return first_order
    if method == "unrolled":
        answer = phi
        for _ in range(num_steps):
            slope = grad(follower_loss_fn(theta, answer), answer, create_graph=True)
            answer = [x - step_size * dx for x, dx in zip(answer, slope)]  # φ⁺
        correction = [b - a for a, b in zip(first_order, grad(leader_loss_fn(theta, answer), theta))]
    elif method == "implicit":
        slope = parameters_to_vector(grad(follower_loss_fn(theta, phi), phi, create_graph=True))  # ∂f_F/∂φ

        def curvature(x):
            return parameters_to_vector(grad(slope.dot(x), phi)) + damping * x  # (H + λI) x

        x = conjugate_gradients(curvature, parameters_to_vector(grad(loss, phi)), cg_iterations, cg_tolerance)
        correction = [-dx for dx in grad(slope.dot(x), theta)]  # -M x
    else:
        raise ValueError(f"unknown leader gradient {method!r}: first-order, unrolled or implicit")
    longest = math.inf if clamp is None else clamp * get_total_norm(first_order)
    scale = (longest / get_total_norm(correction).clamp_min(1e-30)).clamp(max=1)
    return [a + scale * b for a, b in zip(first_order, correction)]


def perceive(leader: Leader, obs: torch.Tensor, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """What the leader makes of `obs`, and what it pays for that: (features (B, F), C_θ (B,), Eq. (9))."""
    features, attention = leader(obs, num_rows=0 if args.perception_cost == "concentration" else args.cost_rows)
    return features, perception_cost(attention, args.perception_cost) if attention else features.new_zeros(len(obs))


def leader_step(leader: Leader, follower: Follower, optimizer, batch: Batch, args: Args) -> tuple[torch.Tensor, dict]:
    """The leader's move on a minibatch, in θ: φ is held fixed, or its answer anticipated (--leader-gradient). Where
    nobody leads, θ gets its gradient only. Returns (the features (B, F) it has shown, what to log)."""
    theta, phi = ([p for p in player.parameters() if p.requires_grad] for player in (leader, follower))
    optimizer.zero_grad()
    features, cost = perceive(leader, batch.obs, args)  # lines 7-8
    logits, values = follower(features)  # line 9
    if args.update in ("simultaneous", "stackelberg", "commit"):
        loss, info = leader_loss(logits, values, cost, batch, args)  # lines 10-11
        if args.update == "commit" and info["leader/approx_kl"] > args.leader_max_kl:
            return features, info  # it has moved far enough
    else:  # PPO's; "joint" alone lets the value's error through to θ
        loss, info = follower_loss(logits, values if args.update == "joint" else values.detach(), batch, args)
    if args.leader_gradient == "first-order":
        # DEVIATION: row 7, Eq. (6) asks for the total derivative through φ*(θ); Algorithm 1 takes this one
        loss.backward(inputs=theta)  # φ gets no gradient, and what has none Adam leaves as it is
    else:  # both losses as functions of φ; on θ they depend by `features` and `cost`, whose graph leads back to it
        names = [name for name, parameter in follower.named_parameters() if parameter.requires_grad]

        def answer(phi):
            return functional_call(follower, dict(zip(names, phi)), (features,))

        losses = (
            lambda _, phi: leader_loss(*answer(phi), cost, batch, args)[0],
            lambda _, phi: follower_loss(*answer(phi), batch, args)[0],
        )
        for parameter, gradient in zip(theta, leader_gradient(*losses, theta, phi, args.leader_gradient)):
            parameter.grad = gradient.contiguous()  # fused Adam misreads another layout
    if args.update not in ("joint", "stopped"):
        info["leader/grad_norm"] = clip_grad_norm_(theta, args.max_grad_norm)
    if args.update in ("stackelberg", "commit"):
        optimizer.step()  # line 12
        optimizer.zero_grad()
    return features, info


def follower_step(leader: Leader, follower: Follower, optimizer, batch: Batch, args: Args) -> dict:
    """The follower's answer (lines 14-18) to features (B, F), here `batch.obs`. Where nobody leads, θ moves as well."""
    follower.zero_grad()  # θ keeps what `leader_step` left
    logits, values = follower(batch.obs.detach())  # so that θ gets nothing of this loss
    loss, info = follower_loss(logits, values, batch, args)
    loss.backward()
    players = [leader, follower] if args.update in ("joint", "stopped") else [follower]
    info["losses/grad_norm"] = clip_grad_norm_([p for x in players for p in x.parameters()], args.max_grad_norm)
    optimizer.step()
    return info


def stackelberg_step(leader: Leader, follower: Follower, optimizer, batch: Batch, args: Args) -> dict:
    """One minibatch of Algorithm 1, lines 6-18: the leader moves, then the follower answers. Returns what to log.

    From PPO to SPRIG, each --update adds one change. The follower always descends L_φ.
                    the leader descends              norm clip   moves
      joint         L_φ (PPO)                        of both     at once
      stopped       L_φ, without the value's error   of both     at once
      separate      L_φ, without the value's error   of each     at once
      simultaneous  -u_L, without entropy bonus      of each     at once
      stackelberg   -u_L, without entropy bonus      of each     the leader first
    And "commit" is SPRIG whose leader moves first for a whole rollout: see `update`.
    """
    features, info = leader_step(leader, follower, optimizer, batch, args)
    if args.update in ("stackelberg", "commit"):
        with torch.no_grad():  # line 13: the follower sees what the leader shows now
            features = leader(batch.obs)
    return info | follower_step(leader, follower, optimizer, batch._replace(obs=features), args)


def minibatches(batch: Batch, args: Args) -> Iterator[Batch]:
    """All of `batch` once, in a random order."""
    for rows in torch.randperm(len(batch.obs)).to(batch.obs.device).split(args.minibatch_size):
        minibatch = Batch(*(x[rows] for x in batch))
        if args.norm_adv == "minibatch":
            x = minibatch.advantages
            minibatch = minibatch._replace(advantages=(x - x.mean()) / (x.std() + 1e-8))
        yield minibatch


def update(leader: Leader, follower: Follower, optimizer, batch: Batch, args: Args) -> dict[str, float]:
    """All epochs over one rollout. Returns means over the gradient steps, by TensorBoard's tags. Raises
    FloatingPointError if one of them, or a parameter, is not finite."""
    history, obs, step = [], batch.obs[: args.minibatch_size], stackelberg_step
    if args.update == "commit":  # the leader moves alone: one pass, while the policy stays near the old one
        for minibatch in minibatches(batch, args):
            history.append(leader_step(leader, follower, optimizer, minibatch, args)[1])
            if history[-1]["leader/approx_kl"] > args.leader_max_kl:
                break  # that call took no step
        with torch.no_grad():  # then it is held fixed: its features are computed once for all of the follower's epochs
            features = torch.cat([leader(x) for x in batch.obs.split(args.minibatch_size)])
        batch, step = batch._replace(obs=features), follower_step
    for _ in range(args.update_epochs):
        epoch = [step(leader, follower, optimizer, x, args) for x in minibatches(batch, args)]
        history += epoch
        if args.target_kl and torch.stack([info["losses/approx_kl"] for info in epoch]).mean() > args.target_kl:
            break
    tags = dict.fromkeys(tag for info in history for tag in info)
    metrics = {tag: torch.stack([info[tag] for info in history if tag in info]).mean() for tag in tags}
    parameters = nn.ModuleDict({"leader": leader, "follower": follower}).named_parameters()
    with torch.no_grad():  # finite parameters can still be too large to act
        acts = zip(("the policy", "the value"), follower(leader(obs)))
    for name, value in (*metrics.items(), *parameters, *acts):
        if not value.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")
    return {tag: mean.item() for tag, mean in metrics.items()}


# ==== Evaluation ==================================================================================
@torch.no_grad()
def evaluate(leader: Leader, follower: Follower, args: Args) -> dict:
    """Play `args.eval_episodes` whole games on seeds that training never used, one environment per game, each game
    counted: the first games to end among many would be the short ones. Returns, ready for JSON, raw "returns" and
    "lengths" (agent steps), "mean" and "std" of the returns, and the "protocol"."""
    device = next(follower.parameters()).device
    envs, obs = begin_games(args, 1, num_envs=args.eval_episodes)
    envs.unwrapped.set_attr("one_game", True)
    games = {}  # return and length of each environment's first game
    while len(games) < args.eval_episodes:
        policy = action_distribution(follower(leader(torch.from_numpy(obs).to(device)))[0])
        actions = (policy.mode if args.eval_greedy else policy.sample()).cpu().numpy()
        actions[list(games)] = 0  # a game that is over idles
        obs, _, _, _, info = envs.step(actions)
        for row in np.flatnonzero(info.get("_episode", ())):
            games.setdefault(row, (info["episode"]["r"][row].item(), info["episode"]["l"][row].item()))
    envs.close()
    returns, lengths = map(list, zip(*(games[row] for row in sorted(games))))
    scores = {"returns": returns, "lengths": lengths, "mean": np.mean(returns), "std": np.std(returns)}
    return scores | {"greedy": args.eval_greedy, "protocol": env_protocol(args)}


def load_agent(run_dir: Path | str, device: str = "cpu") -> tuple[Args, Leader, Follower]:
    """The agent of a run, as its last checkpoint (or else model.pt) holds it."""
    args, run_dir = read_args(run_dir), Path(run_dir)
    leader, follower = make_agent(args, device)
    path = run_dir / "checkpoint.pt"
    load(path if path.exists() else run_dir / "model.pt", {"leader": leader, "follower": follower})
    return args, leader, follower


# ==== Main ========================================================================================
PACKAGES = ("torch", "numpy", "gymnasium", "ale-py", "MinAtar", "mujoco", "dm_control", "box2d")  # in args.json
# What may differ when a run is resumed or evaluated: how long it is, and where it runs.
MAY_CHANGE = {"total_timesteps", "device", "threads", "eval_episodes", "eval_greedy", "track", "resume", "evaluate"}


def make_agent(args: Args, device: str) -> tuple[Leader, Follower]:
    try:  # a task that fails or breaks its own declaration shows it here, before anything is written
        envs, _ = begin_games(args, 0, num_envs=1)
        envs.step(envs.action_space.sample())
    except Exception as error:
        fail(f"--env-id {args.env_id} cannot be played: {type(error).__name__}: {error}")
    torch.manual_seed(args.seed)
    leader = Leader(envs.single_observation_space, args).to(device)
    follower = Follower(leader.num_features, envs.single_action_space).to(device)
    envs.close()
    return leader, follower


def write(path: Path, content: dict | str) -> None:
    """All or nothing: text, JSON or, for *.pt, PyTorch's format goes to a file beside `path`, which is then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".pt":
        torch.save(content, buffer := io.BytesIO())  # straight to a full disk it raises no OSError
        temporary.write_bytes(buffer.getbuffer())
    else:
        temporary.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def load(path: Path, parts: dict) -> dict:
    """Put what a *.pt file holds of `parts` into them. Returns all that it holds."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception as error:  # whatever is wrong with it
        fail(f"{path} cannot be read: {type(error).__name__}: {error}")
    return state


def read_args(run_dir: Path | str) -> Args:
    """The arguments that a run of this script was started with."""
    try:
        record = json.loads((Path(run_dir) / "args.json").read_text())
        if record["script"] != Path(__file__).name:
            raise ValueError(f"that is a run of {record['script']}")
        return Args(**record["arguments"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{run_dir} is not the folder of a run of {Path(__file__).name}, or its args.json is damaged: {error}")


def train(args: Args, device: torch.device) -> Path:
    """From the first rollout, or that after the checkpoint, to the last. Returns the run's folder. Exits if stopped."""
    leader, follower = make_agent(args, device)  # before the folder: a task that cannot be played leaves none behind
    optimizer = torch.optim.Adam([{"params": x.parameters()} for x in (leader, follower)], eps=1e-5, fused=True)
    parts = {"leader": leader, "follower": follower, "optimizer": optimizer}
    progress = {"step": 0, "seconds": 0.0, "started": time.time()}
    if args.resume is not None:  # before args.json is written anew
        saved = load(Path(args.resume) / "checkpoint.pt", parts)
        progress = {name: saved[name] for name in progress}
        if progress["step"] > args.total_timesteps:
            fail(f"--total-timesteps {args.total_timesteps}: {args.resume} has taken {progress['step']} steps already")
    name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{time.time_ns() // 10**6}"
    run_dir = Path(args.resume or args.run_dir or f"runs/{name}")
    if not args.resume and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        fail(f"--run-dir {run_dir} is not empty; name a new folder, or continue that run with --resume")
    run_dir.mkdir(parents=True, exist_ok=True)
    versions = {found.name: found.version for found in metadata.distributions() if found.name in PACKAGES}
    versions |= {"python": sys.version.split()[0], "script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    record = {"script": Path(__file__).name, "arguments": asdict(args) | {"resume": None}, "versions": versions}
    write(run_dir / "args.json", record | {"protocol": env_protocol(args)})
    if args.resume is None:
        write(run_dir / "checkpoint.pt", progress | {name: part.state_dict() for name, part in parts.items()})
    step, started, clock = progress["step"], progress["started"], time.monotonic() - progress["seconds"]
    rollout_size = args.num_envs * args.num_steps
    last = args.total_timesteps // rollout_size
    for stale in ("model.pt", "evaluation.json") if step // rollout_size < last else ():  # of an end that is none now
        (run_dir / stale).unlink(missing_ok=True)

    # episodes.csv is the record of a run, TensorBoard a view of it. What lies beyond the checkpoint is done again.
    episodes, head = run_dir / "episodes.csv", "agent_steps,seconds,episodic_return,episodic_length"
    rows = episodes.read_text().splitlines()[1:] if episodes.exists() else []
    rows = [row for row in rows if "," in row and int(row.split(",")[0]) <= step]
    write(episodes, "\n".join([head, *rows, ""]))
    for k, path in enumerate(sorted(run_dir.glob("events.out.tfevents.*"))):  # in this order, whatever the clock says
        path.rename(run_dir / f"events.out.tfevents.{k:010d}.{path.name.split('.', 4)[4]}")
    if args.track:
        import wandb

        wandb.init(project="sprig", id=run_dir.name, resume="allow", config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    writer.add_text("arguments", "\n".join(f"    {name} = {value}" for name, value in asdict(args).items()))

    envs, shown, stops, scores = None, -60.0, [], []  # the first line is due at once

    def stop(number, frame):  # the first Ctrl-C or SIGTERM ends training after this iteration, the second at once
        stops.append(number)
        if len(stops) > 1:
            os._exit(128 + number)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    for iteration in range(step // rollout_size, last):
        if envs is None:  # at step 0 and after each checkpoint
            envs, obs = begin_games(args, 0, step)
            leader.normaliser.running = 0.0
        rate = args.learning_rate * (1 - iteration / last if args.anneal_lr else 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.param_groups[0]["lr"] *= args.leader_rate_factor
        batch, obs, games = collect_rollout(envs, obs, leader, follower, args)
        try:
            metrics = update(leader, follower, optimizer, batch, args)
            leader.normaliser.observe(batch.obs)
        except FloatingPointError as error:
            fail(f"after step {step}: {error}; the checkpoint of step {progress['step']} in {run_dir} is good")

        seconds = time.monotonic() - clock  # of all sittings
        with open(episodes, "a") as file:
            for t, score, length in games:
                at = step + t * args.num_envs
                file.write(f"{at},{seconds:.1f},{score:.7g},{length}\n")
                writer.add_scalar("charts/episodic_return", score, at, started + seconds)
                writer.add_scalar("charts/episodic_length", length, at, started + seconds)
                scores.append(score)
        step += rollout_size
        final, speed = bool(stops) or iteration + 1 == last, step / seconds
        attention, picture = leader.look(batch.obs[-256:])
        metrics |= attention
        unexplained = ((batch.returns - batch.values).var() / batch.returns.var()).item()
        metrics |= {"losses/explained_variance": 1 - unexplained, "charts/SPS": speed, "charts/learning_rate": rate}
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, step, started + seconds)
        if picture.numel() and (final or iteration == 0 or step % 100_000 < rollout_size):
            writer.add_image("leader/attention", picture, step, started + seconds, dataformats="HW")
        if final or sys.stderr.isatty() or seconds - shown >= 60:  # a log file gets a line a minute
            shown, total = seconds, last * rollout_size
            score = f"{np.mean(scores[-20:]):.1f}" if scores else "-"
            bar, hours = "#" * (20 * step // total), (total - step) / speed / 3600
            line = f"[{bar:20}] {step:,} of {total:,} steps, {speed:.0f}/s, {hours:.2f} h left, return {score}"
            say(f"\r{line}\033[K" if sys.stderr.isatty() else f"{line}\n")
        # A checkpoint is due if this rollout has crossed a multiple of the interval. Games then begin anew.
        if final or (args.checkpoint_interval and step % args.checkpoint_interval < rollout_size):
            writer.flush()
            progress |= {"step": step, "seconds": seconds}
            write(run_dir / "checkpoint.pt", progress | {name: part.state_dict() for name, part in parts.items()})
            envs.close()
            envs = None
        if stops:
            say(f"\nstopped at step {step}; go on with: python {sys.argv[0]} --resume '{run_dir}'\n")
            raise SystemExit(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    say("\n" * sys.stderr.isatty())
    writer.close()
    write(run_dir / "model.pt", {"leader": leader.state_dict(), "follower": follower.state_dict()})
    return run_dir


def main(args: Args) -> dict:
    """Train, evaluate and save, or with --evaluate play a saved agent. Returns the evaluation ({} if there is none)."""
    if saved_run := args.evaluate or args.resume:
        for name, old in asdict(read_args(saved_run)).items():
            if name not in MAY_CHANGE and (new := getattr(args, name)) != old:
                fail(f"{saved_run} was trained with --{name.replace('_', '-')} {old}, not {new}; leave it out")
    try:
        device = torch.device(args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
        if args.track:
            import wandb  # noqa: F401
    except (RuntimeError, AssertionError, ImportError) as error:
        fail(f"--device {args.device} cannot be used, or --track without `pip install wandb`: {error}")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with contextlib.suppress(OSError, AttributeError):  # glibc: reuse the memory of freed tensors, a tenth of the time
        for parameter, size in ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**30)):
            ctypes.CDLL("libc.so.6").mallopt(parameter, size)
    try:
        run_dir = train(args, device) if args.evaluate is None else Path(args.evaluate)
        evaluation = evaluate(*load_agent(run_dir, device)[1:], args) if args.eval_episodes else {}
        if evaluation:
            write(run_dir / "evaluation.json", evaluation)
            score = f"{evaluation['mean']:.1f} ± {evaluation['std']:.1f}"
            say(f"evaluation over {args.eval_episodes} games: {score}\n", sys.stdout)
    except OSError as error:  # a full disk, a folder that was removed
        fail(f"{error.filename or 'the run'} cannot be written: {error.strerror}; what was saved before is untouched")
    say(f"run saved in {run_dir}\n", sys.stdout)
    return evaluation


def parse_args() -> Args:
    """The command line; with --resume or --evaluate, the arguments of that run are the defaults."""
    groups = {"run": RunArgs, "environment": EnvironmentArgs, "ppo": PpoArgs, "sprig": SprigArgs}

    def parse(defaults: Args) -> dict:
        values = asdict(defaults)
        parts = {name: group(**{f.name: values[f.name] for f in fields(group)}) for name, group in groups.items()}
        about = "\n\n".join((__doc__ or "").split("\n\n")[:2])
        parsed = tyro.cli(tyro.conf.OmitArgPrefixes[dict], default=parts, description=about)
        return {name: value for part in parsed.values() for name, value in vars(part).items()}

    given = parse(Args())
    try:
        if saved_run := given["evaluate"] or given["resume"]:
            given = parse(replace(read_args(saved_run), resume=given["resume"], evaluate=given["evaluate"]))
        return Args(**given)
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed: cron
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what its encoding lacks shows as ?
    try:
        main(parse_args())
    except BrokenPipeError:  # of `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:  # before training, or in an evaluation, which --resume repeats
        fail("interrupted; what was saved before is untouched")
