"""SPRIG and PPO on state vectors: every family of environments, normalisation, time limits, switches, whole runs."""

import copy
import json
import shutil
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, ROOT, VECTORS
from test_resume import finish, same_end, start, wait_for
from test_runs import scalars

FAMILIES = [
    "CartPole-v1", "Acrobot-v1", "MountainCarContinuous-v0", "Pendulum-v1", "LunarLander-v3",
    "LunarLanderContinuous-v3",
    "BipedalWalker-v3", "InvertedPendulum-v5", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Humanoid-v5",
    "dm_control/cartpole-balance-v0", "dm_control/cheetah-run-v0",
]  # fmt: skip
SMALL = {"num_steps": 64, "minibatch_size": 32, "update_epochs": 1, "max_episode_steps": 25, "threads": 1}
SMALL |= {"device": "cpu"}
RUN = {**SMALL, "total_timesteps": 384, "checkpoint_interval": 64, "eval_episodes": 2}


@pytest.fixture(params=VECTORS.values(), ids=VECTORS.keys())
def script(request):
    """Each of the twins in turn."""
    return request.param


def build(script, args, envs):
    leader = script.Leader(envs.single_observation_space, args)
    return leader, script.Follower(leader.num_features, envs.single_action_space)


@pytest.mark.parametrize("env_id", FAMILIES)
def test_every_family_trains_an_iteration_and_is_evaluated(script, env_id, tmp_path):
    settings = {**SMALL, "total_timesteps": 64, "eval_episodes": 2}
    evaluation = script.main(script.Args(env_id=env_id, run_dir=str(tmp_path / "run"), **settings))
    assert len(evaluation["returns"]) == 2 and np.isfinite(evaluation["returns"]).all()
    assert 0 < min(evaluation["lengths"]) and max(evaluation["lengths"]) <= 25
    protocol = json.loads((tmp_path / "run" / "args.json").read_text())["protocol"]
    assert protocol["env_id"] == env_id and str(protocol["time_limit"]).startswith("25")
    assert np.isfinite([v for points in scalars(tmp_path / "run").values() for _, v in points]).all()


@pytest.mark.parametrize("env_id", FAMILIES)
def test_restarted_environments_forget_what_came_before(env_id):
    """After a restart, a used environment plays just like a new one (if not used for long, see BipedalWalker below)."""
    script = CONTINUOUS["sprig_continuous"]
    args = script.Args(env_id=env_id, num_envs=2, distractors=1, observation_noise=0.1)
    histories = []
    for steps_before in (0, 37):
        envs = script.make_envs(args)
        rng = np.random.default_rng(0)
        envs.reset(seed=[5, 6])
        for _ in range(steps_before):
            envs.step(envs.action_space.sample())
        history = [script.restart(envs, args, 64)]
        for _ in range(40):
            space = envs.single_action_space
            box = isinstance(space, gym.spaces.Box)
            actions = rng.uniform(-1, 1, (2, *space.shape)) if box else rng.integers(space.n, size=2)
            obs, rewards, *_ = envs.step(actions)
            history += [obs, rewards]
        histories.append(history)
        envs.close()
    for a, b in zip(*histories):
        np.testing.assert_array_equal(a, b)


def test_cartpole_is_solved(script, tmp_path):
    args = script.Args(
        env_id="CartPole-v1", total_timesteps=32_768, num_envs=4, num_steps=256, minibatch_size=128,
        learning_rate=1e-3, target_kl=None, threads=1, eval_episodes=10, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    evaluation = script.main(args)
    returns = [value for _, value in scalars(tmp_path / "run")["charts/episodic_return"]]
    assert np.mean(returns[-20:]) > 400 and evaluation["mean"] > 400
    assert np.mean(returns[:20]) < 50, "it was not solved to begin with"


class Constant(gym.Env):
    """A reward of 1 at every step. Shows how far the episode of 20 steps has come, or nothing if it only breaks off."""

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, terminates: bool):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self):
        return np.array([1, self.t / 20 if self.terminates else 0], dtype=np.float32)

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, self.terminates and self.t == 20, False, {}


class Odd(gym.Env):
    """Whatever a test asks for."""

    def __init__(self, observation=0.0, size=2, actions=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        self.action_space = actions or gym.spaces.Discrete(2)
        self.value = observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(self.observation_space.shape), {}

    def step(self, action):
        self.t += 1
        return np.full(self.observation_space.shape, self.value if self.t == 15 else 0.0), 1.0, self.t == 20, False, {}


def odd(name, **kwargs):
    gym.register(f"{name}-v0", Odd, kwargs=kwargs, max_episode_steps=20)
    return f"{name}-v0"


for terminates in (False, True):
    gym.register(f"Constant{terminates}-v0", Constant, kwargs={"terminates": terminates}, max_episode_steps=20)


@pytest.mark.parametrize("terminates", [False, True])
def test_a_truncated_task_goes_on_in_value_and_a_terminated_one_ends(script, terminates, tmp_path):
    args = script.Args(
        env_id=f"Constant{terminates}-v0", norm_obs=False, norm_rewards=False, gamma=0.9, learning_rate=3e-3,
        num_envs=4, num_steps=64, minibatch_size=64, total_timesteps=256 * 40, clip_value_loss=False, vf_coef=1.0,
        max_grad_norm=10, threads=1, eval_episodes=0, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    script.main(args)
    envs = script.make_envs(args)
    leader, follower = build(script, args, envs)
    script.load_agent(tmp_path / "run", leader, follower)
    with torch.no_grad():
        _, values = follower(leader(torch.tensor([[1.0, 0.0], [1.0, 0.75]])))
    if terminates:
        expected = [(1 - 0.9**20) / (1 - 0.9), (1 - 0.9**5) / (1 - 0.9)]  # 20 and 5 steps to go: 8.78 and 4.10
        assert values.tolist() == pytest.approx(expected, rel=0.1)
    else:
        assert values[0].item() == pytest.approx(1 / (1 - 0.9), rel=0.05), "the time limit must not be an end"


def test_rollout_bootstraps_from_the_true_final_observation(script):
    args = script.Args(env_id="Pendulum-v1", num_envs=2, num_steps=24, max_episode_steps=20)
    envs = script.make_envs(args)
    leader, follower = build(script, args, envs)
    rollout = script.allocate_rollout(args, envs, torch.device("cpu"))
    obs, _ = envs.reset(seed=[5, 6])
    _, games = script.collect_rollout(envs, obs, leader, follower, rollout)
    assert [(step, length) for step, _, length in games] == [(20, 20), (20, 20)]
    assert rollout.dones[19].all() and not rollout.terminations.any() and rollout.dones.sum() == 2
    for row, seed in enumerate((5, 6)):  # the same game without anything that could restart it
        env, total = gym.make("Pendulum-v1"), 0.0
        env.reset(seed=seed)
        for action in rollout.actions[:20, row].numpy():
            final, reward, *_ = env.step(action.clip(-2, 2))
            total += reward
        with torch.no_grad():
            value = follower(leader(torch.from_numpy(final).unsqueeze(0)))[1].item()
        assert rollout.next_values[19, row].item() == pytest.approx(value, abs=1e-4)
        assert rollout.values[20, row].item() != pytest.approx(value, abs=1e-4)
        assert games[row][1] == pytest.approx(total, abs=1e-3)


def test_moments_and_reward_scale_are_those_of_all_that_was_seen(script):
    rng = np.random.default_rng(0)
    moments, data = script.RunningMoments(3), rng.normal([5, -100, 0], [1, 10, 0.01], size=(1000, 3))
    for part in np.split(data.astype(np.float32), [100, 101, 700]):
        moments.observe(torch.from_numpy(part))
    np.testing.assert_allclose(moments.mean, data.mean(0), rtol=1e-4)
    np.testing.assert_allclose(moments.var, data.var(0), rtol=1e-3)
    assert moments.count == 1000

    normaliser = script.Normaliser(3, script.Args(gamma=0.8))
    rewards, dones = rng.normal(size=(40, 2)), rng.random((40, 2)) < 0.2
    returns, running = [], np.zeros(2)
    for reward, done in zip(rewards, dones):  # Σ γ^i r_{t-i} since the episode's start
        running = 0.8 * running + reward
        returns.append(running)
        running = running * ~done
    rewards, dones = (torch.from_numpy(x.astype(np.float32)) for x in (rewards, dones))
    halves = [normaliser.scale_rewards(rewards[i : i + 20], dones[i : i + 20]) for i in (0, 20)]
    np.testing.assert_allclose(halves[0], rewards[:20] / np.std(returns[:20]), rtol=1e-4)
    np.testing.assert_allclose(halves[1], rewards[20:] / np.std(returns), rtol=1e-4)


def test_the_normaliser_is_saved_with_the_agent_and_frozen_in_evaluation(script, tmp_path):
    args = script.Args(env_id="Pendulum-v1", run_dir=str(tmp_path / "run"), **RUN)
    evaluation = script.main(args)
    envs = script.make_envs(args)
    leader, follower = build(script, args, envs)
    script.load_agent(tmp_path / "run", leader, follower)
    assert leader.normaliser.entries.count == 384 and leader.normaliser.discounted_return.count == 384
    obs = torch.tensor([[0.5, 0.5, 100.0]])
    expected = (obs - leader.normaliser.entries.mean) / leader.normaliser.entries.var.sqrt()
    torch.testing.assert_close(leader.normaliser(obs), expected.clamp(-10, 10), atol=1e-4, rtol=1e-4)
    before = copy.deepcopy(leader.state_dict())
    assert script.evaluate(leader, follower, args, torch.device("cpu"))["returns"] == evaluation["returns"]
    assert all(torch.equal(before[key], value) for key, value in leader.state_dict().items())


def test_the_policy_that_is_updated_is_the_one_that_acted(script, tmp_path, monkeypatch):
    """The statistics move between iterations: before the first step every probability ratio is 1."""
    ratios, real = [], script.update

    def update(leader, follower, leader_optimizer, follower_optimizer, batch, args):
        with torch.no_grad():
            policy = script.action_distribution(follower(leader(batch.obs))[0])
        ratios.append((policy.log_prob(batch.actions) - batch.logprobs).abs().max().item())
        return real(leader, follower, leader_optimizer, follower_optimizer, batch, args)

    monkeypatch.setattr(script, "update", update)
    settings = {**RUN, "observation_noise": 0.1, "distractors": 2}
    script.main(script.Args(env_id="HalfCheetah-v5", run_dir=str(tmp_path / "run"), **settings))
    assert len(ratios) == 6 and max(ratios) < 1e-4


def test_noise_and_distractors_reach_the_leader_and_delay_moves_reward(script):
    common = {"env_id": "HalfCheetah-v5", "num_envs": 2}
    plain, disturbed = (
        script.Args(**common),
        script.Args(**common, observation_noise=0.3, distractors=4, reward_delay=7),
    )
    histories = []
    for args in (plain, disturbed):
        envs, rng = script.make_envs(args), np.random.default_rng(0)
        obs, _ = envs.reset(seed=[1, 2])
        history = [(obs, np.zeros(2))] + [envs.step(rng.uniform(-1, 1, (2, 6)))[:2] for _ in range(1001)]
        histories.append([np.array(x) for x in zip(*history)])
        assert envs.single_observation_space.shape == obs.shape[1:]
        envs.close()
    (obs, rewards), (seen, paid) = histories
    np.testing.assert_array_equal(seen[:, :, 0, :17], obs)
    assert seen[:, :, 0, 17:].std() == pytest.approx(1, rel=0.05), "distractors are standard normal"
    np.testing.assert_allclose(paid[1:995].reshape(-1, 7, 2).sum(1), rewards[1:995].reshape(-1, 7, 2).sum(1), rtol=1e-6)
    assert not paid[1:7].any() and not paid[8:14].any() and paid[7].all()
    assert paid[1000] == pytest.approx(rewards[995:1001].sum(0), rel=1e-6), "what is due is paid at the end"
    normaliser = script.Normaliser(21, disturbed)
    normaliser.observe(torch.from_numpy(seen[:, :, 0].reshape(-1, 21)))
    batch = torch.from_numpy(seen[:200].reshape(-1, 2, 21))
    noise = normaliser(batch) - normaliser(batch[:, 0])
    assert noise.std().item() == pytest.approx(0.3, rel=0.05), "a fraction of the normalised range"


def test_observations_and_actions_are_named():
    script = CONTINUOUS["sprig_continuous"]
    names = {env_id: script.observation_names(script.Args(env_id=env_id)) for env_id in FAMILIES}
    for env_id in FAMILIES:
        envs = script.make_envs(script.Args(env_id=env_id))
        assert len(names[env_id]) == envs.single_observation_space.shape[0]
        envs.close()
    assert names["CartPole-v1"] == ["position", "velocity", "angle", "angular velocity"]
    assert names["HalfCheetah-v5"][:2] == ["pos rootz", "pos rooty"] and names["HalfCheetah-v5"][8] == "vel rootx"
    assert names["dm_control/cheetah-run-v0"][7:9] == ["position 7", "velocity 0"]
    assert not any(len(set(names[env_id])) < 2 or names[env_id][0] == "0" for env_id in FAMILIES)
    named = script.observation_names(script.Args(env_id="CartPole-v1", distractors=2))
    assert named[4:] == ["noise 0", "noise 1"]


def test_permuted_entries_with_permuted_parameters_give_the_same_policy():
    script = CONTINUOUS["sprig_continuous"]
    args = script.Args()
    space, actions = gym.spaces.Box(-1, 1, (9,), np.float32), gym.spaces.Box(-1, 1, (3,), np.float32)
    leader = script.Leader(space, args)
    for gate in (*leader.layer_gates, *(block.gate for block in leader.blocks)):
        gate.data.fill_(0.7)
    for norm in leader.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    follower = script.Follower(leader.num_features, actions)
    obs, order = torch.randn(5, 9), torch.randperm(9)
    other_leader, other_follower = copy.deepcopy((leader, follower))
    for module in (other_leader, *other_leader.norms):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data[order]
    for head in (other_follower.actor, other_follower.critic):
        weight = head[0].weight.data.view(64, 9, -1)
        head[0].weight.data = weight[:, order].flatten(1)
    with torch.no_grad():
        expected, permuted = follower(leader(obs)), other_follower(other_leader(obs[:, order]))
        unmoved = other_follower(other_leader(obs))
    for a, b in zip(expected, permuted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert (unmoved[1] - expected[1]).abs().max() > 1e-3
    received, received_permuted = leader.attention_received(obs), other_leader.attention_received(obs[:, order])
    for a, b in zip(received, received_permuted):
        torch.testing.assert_close(a[:, order], b, atol=1e-5, rtol=1e-4)


def test_entries_stay_apart_in_the_features_unless_read_literally():
    """Row 4: without residual, attention averages the tokens into one."""
    script = CONTINUOUS["sprig_continuous"]
    obs = torch.randn(64, 17)
    spread = {}
    for attention in ("gated", "figure4"):
        leader = script.Leader(
            gym.spaces.Box(-1, 1, (17,), np.float32), script.Args(attention=attention, feature_scale=1)
        )
        with torch.no_grad():
            spread[attention] = leader(obs).view(64, 17, -1).std(1).mean().item()  # over entries
    assert spread["gated"] > 0.1 and spread["figure4"] < 0.5 * spread["gated"]


def test_features_start_linear_in_the_observation():
    """Measured: behind random kinks of each entry Walker2d is not learnt (docs/paper.md, row 4 on vectors)."""
    script = CONTINUOUS["sprig_continuous"]
    space, obs = gym.spaces.Box(-1, 1, (9,), np.float32), torch.randn(2, 5, 9)
    for attention in ("gated", "none"):
        leader = script.Leader(space, script.Args(attention=attention))
        with torch.no_grad():
            torch.testing.assert_close(leader(obs[0] + 2 * obs[1]), leader(obs[0]) + 2 * leader(obs[1]))
            for gate in leader.layer_gates:
                gate.data.fill_(0.7)
            assert (leader(obs[0] + 2 * obs[1]) - leader(obs[0]) - 2 * leader(obs[1])).abs().max() > 0.01


def test_without_attention_an_entry_changes_the_layers_only_through_their_norm():
    script = CONTINUOUS["sprig_continuous"]
    leader = script.Leader(gym.spaces.Box(-1, 1, (9,), np.float32), script.Args(attention="none"))
    leader.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    for gate in leader.layer_gates:
        gate.data.fill_(0.7)
    obs = torch.randn(5, 9)
    with torch.no_grad():
        change = (leader(obs) - leader(obs.index_fill(1, torch.tensor([4]), 2.0))).view(5, 9, -1).abs().amax((0, 2))
        assert leader(obs, num_rows=0)[1] == []
    assert change.nonzero().flatten().tolist() == [4]


def test_joint_update_is_bit_identical_to_the_baselines():
    sprig, ppo = CONTINUOUS["sprig_continuous"], CONTINUOUS["ppo_continuous_baseline"]
    settings = {"env_id": "Pendulum-v1", "minibatch_size": 8, "update_epochs": 2}
    sprig_args, ppo_args = sprig.Args(update="joint", **settings), ppo.Args(**settings)
    leader, follower = build(sprig, sprig_args, sprig.make_envs(sprig_args))
    obs, advantages = torch.randn(32, 3), torch.randn(32)
    with torch.no_grad():
        logits, values = follower(leader(obs))
        policy = sprig.action_distribution(logits)
        actions = policy.sample()
    columns = (obs, actions, policy.log_prob(actions), values, advantages, values + torch.randn(32))
    results = []
    for script, args in ((sprig, sprig_args), (ppo, ppo_args)):
        players = copy.deepcopy((leader, follower))
        optimizers = [torch.optim.Adam(p.parameters(), lr=1e-3, eps=1e-5, fused=True) for p in players]
        torch.manual_seed(7)
        script.update(*players, *optimizers, script.Batch(*columns), args)
        results.append([p for player in players for p in player.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not torch.equal(results[0][0], leader.token_scale), "nothing was trained"


def test_stages_move_one_player_each():
    script = CONTINUOUS["sprig_continuous"]
    args = script.Args(env_id="Pendulum-v1", perception_cost_weight=0.1, minibatch_size=32, norm_adv="none")
    leader, follower = build(script, args, script.make_envs(args))
    moved, real = [], script.descend

    def descend(*inputs, **player):
        before = [copy.deepcopy(module.state_dict()) for module in (leader, follower)]
        norm = real(*inputs, **player)
        after = [module.state_dict() for module in (leader, follower)]
        moved.append([any(not torch.equal(b[k], a[k]) for k in b) for b, a in zip(before, after)])
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "descend", descend)
        optimizers = [torch.optim.Adam(p.parameters(), lr=1e-3) for p in (leader, follower)]
        obs = torch.randn(32, 3)
        batch = script.Batch(obs, torch.randn(32, 1), *torch.randn(4, 32))
        script.stackelberg_step(leader, follower, *optimizers, batch, args)
    assert moved == [[True, False], [False, True]]


CHEETAH = {"env_id": "HalfCheetah-v5", "num_envs": 2, "num_steps": 32}
# Something of its world outlives a reset, which shows after some 100 steps.
WALKER = {"env_id": "BipedalWalker-v3", "num_steps": 256, "max_episode_steps": 150}


@pytest.mark.parametrize(("name", "task"), [*((name, CHEETAH) for name in VECTORS), ("sprig_continuous", WALKER)])
def test_a_killed_run_ends_like_one_left_alone(name, task, tmp_path):
    interval = task["num_steps"] * task.get("num_envs", 1)
    settings = {**RUN, **task, "observation_noise": 0.1, "checkpoint_interval": interval}
    settings |= {"total_timesteps": 6 * interval}
    whole, run = tmp_path / "whole", tmp_path / "run"
    VECTORS[name].main(VECTORS[name].Args(run_dir=str(whole), **settings))
    process = start(name, run_dir=run, **settings)
    wait_for((run / f"checkpoint-{2 * interval}.pt").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (run / "model.pt").exists()
    code, _, errors = finish(name, resume=run)
    assert code == 0, errors
    same_end(whole, run)
    shutil.copy(run / "evaluation.json", tmp_path)
    code, output, errors = finish(name, evaluate=run)
    assert code == 0 and "evaluation over 2 games" in output, errors
    assert json.loads((run / "evaluation.json").read_text()) == json.loads((tmp_path / "evaluation.json").read_text())


def test_pictures_show_what_entries_attend_to(tmp_path):
    script = CONTINUOUS["sprig_continuous"]
    args = script.Args(env_id="CartPole-v1", distractors=1)
    leader, _ = build(script, args, script.make_envs(args))
    picture = leader.pictures(torch.randn(4, 5))["leader/attention"]
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    one_hot, uniform = (script.attention_map(weights, list("abcde")) for weights in (np.eye(5), np.full((5, 5), 0.2)))
    heat = [picture[24:144, -144:-24, 0] for picture in (one_hot, uniform)]  # 5 cells of 24 pixels, a cell of margin
    assert heat[0][12, 12] < 50 and heat[0][12, 36] == 255, "the diagonal is dark, the rest is white"
    assert (heat[1] == 127).all(), "uniform attention is grey"


NOT_FINITE = {"NaN": np.nan, "Infinity": np.inf, "TooLargeForItsSquare": 1e25}
NOT_FINITE = [odd(name, observation=value) for name, value in NOT_FINITE.items()]


@pytest.mark.parametrize("env_id", NOT_FINITE)
def test_observations_that_are_not_finite_stop_the_run_before_they_are_saved(script, env_id, tmp_path):
    settings = {**RUN, "checkpoint_interval": 64, "env_id": env_id}
    with pytest.raises(SystemExit, match="iteration 1: .* not finite.*; the last good checkpoint is .*checkpoint-0.pt"):
        script.main(script.Args(run_dir=str(tmp_path / "run"), **settings))
    assert [path.name for path in script.checkpoint_paths(tmp_path / "run")] == ["checkpoint-0.pt"]


def test_an_environment_of_ones_own_module(script, tmp_path, monkeypatch):
    text = "import gymnasium as gym\nfrom gymnasium.envs.classic_control.cartpole import CartPoleEnv\n"
    (tmp_path / "my_module.py").write_text(text + "gym.register('Mine-v0', CartPoleEnv, max_episode_steps=9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {**SMALL, "max_episode_steps": 0, "total_timesteps": 64, "eval_episodes": 1}
    evaluation = script.main(script.Args(env_id="my_module:Mine-v0", run_dir=str(tmp_path / "run"), **settings))
    assert evaluation["lengths"] == [9]


BAD = {
    "no module": ({"env_id": "no_such_module:Mine-v0"}, "no_such_module"),
    "breaks": ({"env_id": odd("Breaks", size=-1)}, "cannot be made: ValueError"),
    "nothing to see": ({"env_id": odd("Blind", size=0)}, "not a vector"),
    "whole numbers": ({"env_id": odd("Whole", actions=gym.spaces.Box(0, 4, (2,), np.int64))}, "only real vectors"),
    "unknown id": ({"env_id": "HalfCheeta-v5"}, "Did you mean: `HalfCheetah`"),
    "pixels": ({"env_id": "ALE/Pong-v5"}, "for Atari"),
    "not a vector": ({"env_id": "FrozenLake-v1"}, "not a vector"),
    "unknown task": ({"env_id": "dm_control/cheetah-fly-v0"}, "dm_control/cheetah"),
    "negative noise": ({"observation_noise": -1.0}, "--observation-noise must not be negative"),
    "negative distractors": ({"distractors": -1}, "--distractors must not be negative"),
    "no delay": ({"reward_delay": 0}, "--reward-delay must be at least 1"),
    "indivisible": ({"minibatch_size": 100}, "does not divide"),
    "too short": ({"total_timesteps": 2047}, "less than one rollout"),
    "folder is a file": ({"run_dir": "/dev/null/run"}, "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(script, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, message = BAD[case]
    with pytest.raises(SystemExit) as error:
        script.main(script.Args(**changes))
    assert message in error.value.code and error.value.code.startswith("error: ") and "\n" not in error.value.code
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("env_id", "module", "mend"),
    [
        ("HalfCheetah-v5", "mujoco", "pip install mujoco=="),
        ("LunarLander-v3", "Box2D", "pip install box2d=="),
        ("dm_control/cheetah-run-v0", "shimmy", "pip install shimmy=="),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(env_id, module, mend, tmp_path):
    code = f"import sys; sys.modules[{module!r}] = None; sys.argv = ['x', '--env-id', {env_id!r}]\n"
    code += "import sprig_continuous as script; script.main(script.parse_args())"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith(f"error: --env-id {env_id}") and mend in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
