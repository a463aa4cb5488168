"""What is particular to the scripts for state vectors: families of tasks, their faults, normalisation, entries."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import VECTORS
from test_environment import Spy

import sprig_continuous

FAMILIES = [
    "CartPole-v1", "MountainCarContinuous-v0", "Pendulum-v1", "LunarLander-v3", "LunarLanderContinuous-v3",
    "BipedalWalker-v3", "InvertedPendulum-v5", "HalfCheetah-v5", "Humanoid-v5", "dm_control/cheetah-run-v0",
]  # fmt: skip


@pytest.fixture(params=VECTORS.values(), ids=VECTORS.keys())
def script(request):
    """Each script for state vectors in turn, and forks of them."""
    return request.param


class Odd(gym.Env):
    """Whatever a test asks for. Pays 1 a step, and keeps the last action in `Odd.action`."""

    def __init__(self, shown=None, reward=1.0, four=False, space=None, actions=None, games=None, fails=False):
        self.observation_space = space or gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = actions or gym.spaces.Discrete(2)
        self.shown, self.reward, self.four, self.games, self.fails = shown, reward, four, games, fails
        self.played = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.fails or self.games is not None and self.played == self.games:
            raise RuntimeError("no game is left")
        self.played, self.left = self.played + 1, 5 + self.np_random.integers(20)
        return self.observe(), {}

    def observe(self):
        return self.observation_space.sample() * 0 if self.shown is None else self.shown

    def step(self, action):
        Odd.action = action
        self.left -= 1
        result = self.observe(), self.reward, self.left == 0, False, {}
        return (*result[:3], {}) if self.four else result


class Global(Odd):
    """Draws from the generator that all share, as some tasks do."""

    def observe(self):
        return np.random.randn(2)  # noqa: NPY002


def registered(make, **kwargs):
    name = f"Odd{len(gym.registry)}-v0"
    gym.register(name, make, kwargs=kwargs, max_episode_steps=50)
    return name


ONE, PAIR, THREE = np.float32(1), gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Discrete(3)
DICT = gym.spaces.Dict({"b": gym.spaces.Box(0, 9, (2, 2)), "a": gym.spaces.Box(0, 9, (1,))})
IMAGE = gym.spaces.Dict({"a": gym.spaces.Box(0, 1, (1,)), "camera": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)})


def collect(script, args, rollouts=1):
    """The agent after some rollouts without training: (leader, follower, batches, what the environment gave)."""
    leader, follower = script.make_agent(args, "cpu")
    envs, obs = script.begin_games(args, 0, 0)
    envs, batches = Spy(envs), []
    for _ in range(rollouts):
        batch, obs, games = script.collect_rollout(envs, obs, leader, follower, args)
        batches.append((batch, games))
        leader.normaliser.observe(batch.obs)
    envs.close()
    return leader, follower, batches, envs.seen


# ==== Tasks =======================================================================================
@pytest.mark.parametrize("env_id", FAMILIES)
def test_every_family_is_played_and_learnt_from(script, env_id):
    args = script.Args(env_id=env_id, num_steps=32, minibatch_size=32, max_episode_steps=25, update_epochs=1)
    leader, follower, [(batch, games)], _ = collect(script, args)
    assert [(t, length) for t, _, length in games[:1]] == [(25, 25)] or games[0][2] < 25
    optimizer = torch.optim.Adam([*leader.parameters(), *follower.parameters()], fused=True)
    metrics = script.update(leader, follower, optimizer, batch, args)
    assert np.isfinite(list(metrics.values())).all()
    protocol = script.env_protocol(args)
    assert protocol["time_limit"] == 25 and protocol["observation"] == f"{batch.obs.shape[1]} entries"
    assert script.env_protocol(script.Args(env_id="CartPole-v1"))["time_limit"] == 500  # the task's own


@pytest.mark.parametrize("env_id", ["BipedalWalker-v3", registered(Global)])
def test_games_begin_alike_from_one_seed_whatever_came_before(script, env_id):
    """BipedalWalker's world outlives a reset, which shows after some 100 steps; others draw from np.random."""
    args, histories = script.Args(env_id=env_id, observation_noise=0.1, distractors=2), []
    for _ in range(2):
        envs, obs = script.begin_games(args, 0, 0)
        rng = np.random.default_rng(0)
        space = envs.single_action_space
        actions = rng.uniform(-1, 1, (150, 1, 4)) if space.shape else rng.integers(2, size=(150, 1))
        histories.append([obs] + [envs.step(action)[0] for action in actions])
        envs.close()
    np.testing.assert_array_equal(*histories)
    assert not np.array_equal(histories[0][0], histories[0][1])


def test_dictionaries_are_flattened(script):
    first = {"a": np.array([1.0]), "b": np.array([[2.0, 3.0], [4.0, 5.0]])}
    args = script.Args(env_id=registered(Odd, space=DICT, shown=first), num_envs=2)
    envs, obs = script.begin_games(args, 0, 0)
    assert obs.tolist() == [[1, 2, 3, 4, 5]] * 2 and obs.dtype == np.float32
    assert script.env_protocol(args)["observation"] == "5 entries"


def changed(function, space):
    return lambda env: gym.wrappers.TransformAction(env, function, space)


WRAPPED = {  # name: (wrapper, the space that it shows, an action in it, what reaches the task)
    "rescaled": (lambda env: gym.wrappers.RescaleAction(env, -ONE, ONE), str(PAIR), [5.0, -0.5], [2.0, -1.0]),
    "fewer": (changed(lambda a: np.append(a, 0), PAIR), str(PAIR), [-7.0, 0.5], [-1.0, 0.5, 0.0]),
    "discrete": (changed(lambda a: np.full(2, a - 1), THREE), "Discrete(3)", 2, [1, 1]),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_wrapped_tasks_actions_count(script, kind):
    """In the record, in the policy and in clipping."""
    wrap, shown, given, taken = WRAPPED[kind]
    inner = gym.spaces.Box(-2, 2, (len(taken),), np.float32)
    args = script.Args(env_id=registered(lambda **_: wrap(Odd(actions=inner))))
    assert script.env_protocol(args)["action"] == shown
    assert script.make_agent(args, "cpu")[1].actor[-1].out_features == (3 if kind == "discrete" else 2)
    envs, _ = script.begin_games(args, 0, 0)
    envs.step(np.array([given]))
    np.testing.assert_allclose(Odd.action, taken)


REFUSED = {
    "unknown": ("HalfCheeta-v5", "Did you mean: `HalfCheetah`"),
    "pixels": ("ALE/Pong-v5", "for pixels there is sprig_atari.py"),
    "one number": ("FrozenLake-v1", "not a vector"),
    "image": (registered(Odd, space=IMAGE["camera"]), "not a vector"),
    "image in a dictionary": (registered(Odd, space=IMAGE), "not a vector"),
    "nothing to see": (registered(Odd, space=gym.spaces.Box(0, 1, (0,))), "not a vector"),
    "whole numbers": (registered(Odd, actions=gym.spaces.Box(0, 4, (2,), np.int64)), "only real vectors"),
    "no module": ("no_such_module:Mine-v0", "no_such_module"),
    "unknown task": ("dm_control/cheetah-fly-v0", "dm_control/cheetah"),
    "constructor": (registered(Odd, wrong=1), "TypeError: Odd.__init__() got an unexpected keyword"),
    "shape": (registered(Odd, shown=np.zeros(3)), "shows [0. 0. 0.], not 2 finite numbers"),
    "NaN": (registered(Odd, shown=np.array([np.nan, 0])), "shows [nan 0.], not 2 finite numbers"),
    "too large": (registered(Odd, shown=np.array([1e300, 0])), "shows [1.e+300 0.e+000], not 2 finite"),
    "reset": (registered(Odd, fails=True), "cannot be played: RuntimeError: no game is left"),
    "four": (registered(Odd, four=True), "not enough values to unpack (expected 5, got 4)"),
    "reward": (registered(Odd, reward=np.nan), "the reward nan is not finite"),
    "rewards": (registered(Odd, reward=np.ones(2)), "cannot be played: ValueError: can only convert an array"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_task_that_cannot_be_played_is_one_line_and_leaves_no_folder(script, fault, tmp_path):
    env_id, message = REFUSED[fault]
    with pytest.raises(SystemExit) as error:
        script.main(script.Args(env_id=env_id, run_dir=str(tmp_path / "run"), device="cpu"))
    assert error.value.code.startswith(f"error: --env-id {env_id}") and message in error.value.code
    assert "\n" not in error.value.code and len(error.value.code) < 400
    assert not (tmp_path / "run").exists()


MISSING = {"HalfCheetah-v5": "mujoco", "LunarLander-v3": "Box2D", "dm_control/cheetah-run-v0": "shimmy"}


@pytest.mark.parametrize(("env_id", "module"), MISSING.items())
def test_a_missing_package_is_named_with_its_remedy(script, env_id, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith(("gymnasium.envs.box2d.", "gymnasium.envs.mujoco."))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=rf"error: --env-id {env_id} .*requirements.txt.*(?i:{module})"):
        script.make_env(script.Args(env_id=env_id))


def test_a_reward_of_one_entry_is_a_number(script):
    """Logged as it is, and clipped for the learner, if that is asked for."""
    for clip, seen in ((True, 10), (False, 50)):
        settings = {"norm_rewards": False, "gamma": 0.0, "num_steps": 64, "clip_rewards": clip}
        args = script.Args(env_id=registered(Odd, reward=np.array([50])), **settings)
        _, _, [(batch, games)], _ = collect(script, args)
        assert games and all(score == 50 * length for _, score, length in games) and (batch.returns == seen).all()


def test_in_an_evaluation_a_game_that_is_over_idles(script):
    """Each environment plays the one game of its seed, and what the task would do afterwards does not matter."""
    args = script.Args(env_id=registered(Odd, games=1), eval_episodes=4)
    seeds = script.env_seeds(args.seed, 1, num_envs=4)
    expected = [5 + np.random.Generator(np.random.PCG64(seed)).integers(20) for seed in seeds]
    scores = script.evaluate(*script.make_agent(args, "cpu"), args)
    assert scores["lengths"] == scores["returns"] == expected and len(set(expected)) > 1


# ==== Rollout =====================================================================================
@pytest.mark.parametrize("switches", [{}, {"observation_noise": 0.1, "distractors": 2, "reward_delay": 3}], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
@torch.no_grad()
def test_statistics_and_returns_over_rollouts(script, switches, scaled):
    """Against all that was seen at once. With λ = 0 a return is r + γ·V of what the action truly led to: the final
    observation where the time was up, nothing where the task ended."""
    settings = {"env_id": "InvertedPendulum-v5", "num_envs": 2, "num_steps": 64, "max_episode_steps": 9}
    settings |= {"norm_obs": scaled, "norm_rewards": scaled, "norm_adv": "none"}
    args = script.Args(**settings, gamma=0.8, gae_lambda=0.0, **switches)
    leader, follower, batches, seen = collect(script, args, rollouts=3)
    obs, rewards, terminations, truncations, infos = (np.array(x) for x in zip(*seen))
    assert terminations.sum() > 2 and truncations.sum() > 2
    led_to, dones = obs.copy(), terminations | truncations
    for t, row in np.argwhere(dones):
        led_to[t, row] = infos[t]["final_obs"][row]
    sums, running = [], np.zeros(2)
    for reward, done in zip(rewards, dones):  # Σ γ^i r_{t-i} since the episode's start
        running = 0.8 * running + reward
        sums.append(running)
        running = running * ~done
    entries = torch.cat([batch.obs for batch, _ in batches]).double()
    entries = entries[:, 0] if switches else entries
    moments = leader.normaliser.entries
    torch.testing.assert_close(moments.mean.double(), entries.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments.var.double(), entries.var(0, correction=0), atol=1e-5, rtol=1e-3)
    assert moments.count == len(entries) == 384
    if switches:
        assert entries[:, 4:].std().item() == pytest.approx(1, rel=0.1), "distractors are standard normal"
        assert batches[2][0].obs[:, 1].std().item() == pytest.approx(0.1, rel=0.1), "noise is a tenth of that"
        assert (rewards != 0)[~dones].mean() < 0.4, "the learner is paid every third step, and when its episode ends"
    logged = sum(score for _, games in batches for _, score, _ in games)
    last = [np.flatnonzero(done)[-1] + 1 for done in dones.T]
    assert logged == sum(rewards[:end, row].sum() for row, end in enumerate(last)), "all of what was earned"

    before = script.make_agent(args, "cpu")[0].normaliser  # none seen yet
    for k, (batch, _) in enumerate(batches):
        leader.normaliser.entries.load_state_dict(before.entries.state_dict())  # as it was in that rollout
        shown, noise = batch.obs.unbind(1) if switches else (batch.obs, 0)
        if scaled and k:
            past = entries[: 128 * k]
            shown = ((shown - past.mean(0)) / past.std(0, correction=0)).clip(-10, 10).float()
        torch.testing.assert_close(leader.normaliser(batch.obs), shown + noise, atol=1e-3, rtol=1e-3)
        logits, values = follower(leader(batch.obs))
        logprobs = script.action_distribution(logits).log_prob(batch.actions)
        torch.testing.assert_close(logprobs, batch.logprobs, atol=1e-4, rtol=1e-4)  # who is updated is who acted
        part = slice(64 * k, 64 * k + 64)
        scale = np.std(sums[: part.stop]) if scaled else 1.0
        expected = (rewards[part] / scale).clip(-10, 10)
        next_values = follower(leader(torch.from_numpy(led_to[part]).flatten(0, 1)))[1].view(64, 2)
        expected = expected + 0.8 * next_values.numpy() * ~terminations[part]
        np.testing.assert_allclose(batch.returns.view(64, 2), expected, atol=2e-4, rtol=2e-4)
        before.observe(batch.obs)
    assert leader.normaliser(torch.full((1, entries.shape[1]), 1e6)).max() == (10 if scaled else 1e6)


# ==== Entries as tokens ===========================================================================
@torch.no_grad()
def test_features_start_linear_in_the_observation_and_entries_stay_apart_unless_read_literally():
    """Row 4 of docs/paper.md, on vectors."""
    obs, spread, space = torch.randn(2, 64, 17), {}, gym.spaces.Box(-1, 1, (17,), np.float32)
    for attention, gate in (("gated", 0.0), ("none", 0.0), ("gated", 0.7), ("figure4", None)):
        leader = sprig_continuous.Leader(space, sprig_continuous.Args(attention=attention, feature_scale=1.0))
        for parameter in leader.layer_gates if gate else ():
            parameter.fill_(gate)
        bent = leader(obs[0] + 2 * obs[1]) - leader(obs[0]) - 2 * leader(obs[1])
        assert (bent.abs().max() < 1e-4) == (gate == 0)
        spread[attention] = leader(obs[0]).view(64, 17, -1).std(1).mean().item()  # over entries
        info, picture = leader.look(obs[0])
        assert picture.shape == (8 * 17, 0 if attention == "none" else 3 * 8 * 17)
        assert len(info) == {"gated": 9, "figure4": 3, "none": 3}[attention]
    assert spread["gated"] > 0.1 and spread["figure4"] < 0.5 * spread["gated"]
