"""One update of the baselines equals stable-baselines3's on the same rollout, weights and minibatches."""

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv

import ppo_atari_baseline as atari
import ppo_continuous_baseline as continuous


class Frames(gym.Env):
    """An image space with nothing behind it: the reference needs one to build its networks."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(6)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class Vectors(Frames):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


def one_update_of_each(script, args, env, policy, pairs_of, monkeypatch):
    """Builds both agents with one set of weights, plays one rollout of noise with ends in it, and lets both learn."""
    steps, envs = args.num_steps, args.num_envs
    settings = {"n_steps": steps, "batch_size": args.minibatch_size, "n_epochs": args.update_epochs, "device": "cpu"}
    same = {name: getattr(args, name) for name in ("learning_rate", "gamma", "gae_lambda", "ent_coef", "vf_coef")}
    same |= {"clip_range": args.clip_coef, "max_grad_norm": args.max_grad_norm}
    reference = PPO(policy, DummyVecEnv([env] * envs), **settings, **same)
    reference.set_logger(configure(None, []))
    leader = script.Leader(env.observation_space, args)
    follower = script.Follower(leader.num_features, env.action_space)
    pairs = pairs_of(reference.policy, leader, follower)
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())

    env.observation_space.seed(0)
    obs = torch.from_numpy(np.stack([env.observation_space.sample() for _ in range(steps * envs)]))
    with torch.no_grad():
        logits, values = follower(leader(obs))
        distribution = script.action_distribution(logits)
        actions = distribution.sample()
        logprobs = distribution.log_prob(actions)
    obs, actions, logprobs, values = (x.unflatten(0, (steps, envs)) for x in (obs, actions, logprobs, values))
    rewards, last_values, ends = torch.randn(steps, envs), torch.randn(envs), (torch.rand(steps, envs) < 0.2).float()

    buffer = reference.rollout_buffer
    buffer.reset()
    starts = torch.cat([torch.zeros(1, envs), ends[:-1]])  # theirs marks the step after an end
    for t in range(steps):
        buffer.add(obs[t].numpy(), actions[t].numpy(), rewards[t].numpy(), starts[t].numpy(), values[t], logprobs[t])
    buffer.compute_returns_and_advantage(last_values, ends[-1].numpy())
    next_values = torch.cat([values[1:], last_values[None]])
    advantages, returns = script.compute_gae(rewards, values, next_values, ends, ends, args.gamma, args.gae_lambda)
    np.testing.assert_allclose(buffer.advantages, advantages.numpy(), atol=1e-5)
    np.testing.assert_allclose(buffer.returns, returns.numpy(), atol=1e-5)

    # The same minibatches. Theirs numbers transitions environment by environment.
    orders = [np.random.default_rng(epoch).permutation(steps * envs) for epoch in range(args.update_epochs)]
    theirs, ours = iter(orders), iter(orders)
    monkeypatch.setattr(np.random, "permutation", lambda n: next(theirs))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.from_numpy(next(ours)))
    reference.train()
    columns = (obs, actions, logprobs, values, advantages, returns)
    batch = script.Batch(*(x.transpose(0, 1).flatten(0, 1) for x in columns))
    before = [layer.weight.clone() for _, layer in pairs]
    parameters = [*leader.parameters(), *follower.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)
    script.update(leader, follower, optimizer, batch, args)

    for (theirs, ours), old in zip(pairs, before):
        assert (ours.weight - old).abs().max() > 1e-3, "moved, by ten times the tolerance at least"
        torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-4, rtol=0)
    return reference.policy, follower


SETTINGS = {"minibatch_size": 16, "num_steps": 16, "num_envs": 4, "update_epochs": 3, "norm_adv": "minibatch"}


def test_one_update_equals_stable_baselines3(monkeypatch):
    def pairs(theirs, leader, follower):
        encoder = theirs.features_extractor
        layers = [*(encoder.cnn[i] for i in (0, 2, 4)), encoder.linear[0], theirs.action_net, theirs.value_net]
        return list(zip(layers, [*leader.convs, follower.hidden, follower.actor, follower.critic]))

    args = atari.Args(learning_rate=2.5e-4, **SETTINGS)
    one_update_of_each(atari, args, Frames, "CnnPolicy", pairs, monkeypatch)


def test_one_gaussian_update_equals_stable_baselines3(monkeypatch):
    def pairs(theirs, leader, follower):
        net = theirs.mlp_extractor
        actor, critic = [*net.policy_net[::2], theirs.action_net], [*net.value_net[::2], theirs.value_net]
        return list(zip(actor + critic, [*follower.actor[::2], *follower.critic[::2]]))

    plain = {"norm_obs": False, "clip_value_loss": False, "target_kl": None, "anneal_lr": False}
    args = continuous.Args(learning_rate=1e-3, ent_coef=0.01, **plain, **SETTINGS)  # so that the entropy counts
    theirs, follower = one_update_of_each(continuous, args, Vectors, "MlpPolicy", pairs, monkeypatch)
    assert follower.log_std.abs().max() > 1e-3
    torch.testing.assert_close(follower.log_std, theirs.log_std, atol=1e-4, rtol=0)
