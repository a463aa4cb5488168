"""One update of the baselines equals stable-baselines3's on the same rollout, weights and minibatches."""

import gymnasium as gym
import numpy as np
import torch
from conftest import build
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv

import ppo_atari_baseline as ppo
import ppo_continuous_baseline as continuous


class Frames(gym.Env):
    """An image space with nothing behind it: the reference needs one to build its networks."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(6)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def their_ppo(policy, envs, num_steps, learning_rate, args):
    """stable-baselines3's PPO with the settings of `args`, which logs nowhere."""
    reference = PPO(
        policy,
        DummyVecEnv(envs),
        n_steps=num_steps,
        batch_size=args.minibatch_size,
        n_epochs=args.update_epochs,
        learning_rate=learning_rate,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm,
        device="cpu",
    )
    reference.set_logger(configure(None, []))
    return reference


def test_one_update_equals_stable_baselines3(monkeypatch):
    steps, envs, batch_size, epochs, rate = 16, 4, 16, 3, 2.5e-4
    args = ppo.Args(minibatch_size=batch_size, update_epochs=epochs, learning_rate=rate, norm_adv="minibatch")
    leader, follower, *optimizers = build(ppo, args, num_actions=6)
    reference = their_ppo("CnnPolicy", [Frames] * envs, steps, rate, args)
    pairs = [
        (reference.policy.features_extractor.cnn[0], leader.conv1),
        (reference.policy.features_extractor.cnn[2], leader.conv2),
        (reference.policy.features_extractor.cnn[4], leader.conv3),
        (reference.policy.features_extractor.linear[0], follower.hidden),
        (reference.policy.action_net, follower.actor),
        (reference.policy.value_net, follower.critic),
    ]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())

    # One rollout of noise frames, acted on by the common policy, with ends in it.
    obs = torch.randint(0, 256, (steps, envs, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        logits, values = follower(leader(obs.flatten(0, 1)))
        policy = ppo.action_distribution(logits)
        actions = policy.sample()
        logprobs = policy.log_prob(actions)
    values, actions, logprobs = (x.view(steps, envs) for x in (values, actions, logprobs))
    rewards, last_values = torch.randn(steps, envs), torch.randn(envs)
    ends = (torch.rand(steps, envs) < 0.2).float()

    buffer = reference.rollout_buffer
    buffer.reset()
    starts = torch.cat([torch.zeros(1, envs), ends[:-1]])  # theirs marks the step after an end
    for t in range(steps):
        buffer.add(obs[t].numpy(), actions[t].numpy(), rewards[t].numpy(), starts[t].numpy(), values[t], logprobs[t])
    buffer.compute_returns_and_advantage(last_values, ends[-1].numpy())
    next_values = torch.cat([values[1:], last_values.unsqueeze(0)])
    advantages, returns = ppo.compute_gae(rewards, values, next_values, ends, ends, args.gamma, args.gae_lambda)
    np.testing.assert_allclose(buffer.advantages, advantages.numpy(), atol=1e-5)
    np.testing.assert_allclose(buffer.returns, returns.numpy(), atol=1e-5)

    # The same minibatches: they number transitions environment by environment, we step by step.
    orders = [np.random.default_rng(epoch).permutation(steps * envs) for epoch in range(epochs)]
    theirs, ours = iter(orders), iter(orders)
    monkeypatch.setattr(np.random, "permutation", lambda n: next(theirs))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.from_numpy(next(ours)))
    reference.train()
    columns = (obs, actions, logprobs, values, advantages, returns)
    batch = ppo.Batch(*(x.transpose(0, 1).flatten(0, 1) for x in columns))
    before = [ours.weight.clone() for _, ours in pairs]
    ppo.update(leader, follower, *optimizers, batch, args)

    for (theirs, ours), old in zip(pairs, before):
        assert (ours.weight - old).abs().max() > 1e-3, "the update must have moved every layer"
        torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-5, rtol=0)


class Vectors(Frames):
    """A vector space with nothing behind it."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


def test_one_gaussian_update_equals_stable_baselines3(monkeypatch):
    size, batch_size, epochs, rate = 64, 16, 3, 1e-3
    args = continuous.Args(minibatch_size=batch_size, update_epochs=epochs, norm_obs=False, clip_value_loss=False)
    args.ent_coef = 0.01  # so that the Gaussian's entropy counts
    reference = their_ppo("MlpPolicy", [Vectors], size, rate, args)
    leader = continuous.Leader(Vectors.observation_space, args)
    follower = continuous.Follower(leader.num_features, Vectors.action_space)
    optimizers = [torch.optim.Adam([{"params": p.parameters()}], lr=rate, eps=1e-5) for p in (leader, follower)]
    theirs, net = reference.policy, reference.policy.mlp_extractor
    pairs = [(net.policy_net[i], follower.actor[i]) for i in (0, 2)] + [(theirs.action_net, follower.actor[4])]
    pairs += [(net.value_net[i], follower.critic[i]) for i in (0, 2)] + [(theirs.value_net, follower.critic[4])]
    for reference_layer, layer in pairs:
        reference_layer.load_state_dict(layer.state_dict())

    obs, returns, advantages = torch.randn(size, 5), torch.randn(size), torch.randn(size)
    with torch.no_grad():
        logits, values = follower(leader(obs))
        policy = continuous.action_distribution(logits)
        actions = policy.sample()
        logprobs = policy.log_prob(actions)
    buffer = reference.rollout_buffer
    buffer.reset()
    for t in range(size):
        buffer.add(obs[t : t + 1].numpy(), actions[t : t + 1].numpy(), np.zeros(1), np.zeros(1), values[t], logprobs[t])
    buffer.returns, buffer.advantages = returns.view(-1, 1).numpy(), advantages.view(-1, 1).numpy()
    orders = [np.random.default_rng(epoch).permutation(size) for epoch in range(epochs)]
    their_orders, our_orders = iter(orders), iter(orders)
    monkeypatch.setattr(np.random, "permutation", lambda n: next(their_orders))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.from_numpy(next(our_orders)))
    reference.train()
    before = [layer.weight.clone() for _, layer in pairs]
    batch = continuous.Batch(obs, actions, logprobs, values, advantages, returns)
    continuous.update(leader, follower, *optimizers, batch, args)
    for (reference_layer, layer), old in zip(pairs, before):
        assert (layer.weight - old).abs().max() > 1e-3, "the update must have moved every layer"
        torch.testing.assert_close(layer.weight, reference_layer.weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.bias, reference_layer.bias, atol=1e-5, rtol=0)
    assert follower.log_std.abs().max() > 1e-3
    torch.testing.assert_close(follower.log_std, theirs.log_std, atol=1e-5, rtol=0)
