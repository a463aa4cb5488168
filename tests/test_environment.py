"""The games as the Atari scripts play them: the emulator's traps, each on a real game, and MinAtar."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

import sprig_atari

MINATAR, INVADERS = "MinAtar/Breakout-v1", "MinAtar/SpaceInvaders-v1"  # the second pays often


def play(envs, num_steps, seed=3):
    """Random actions; yields (rewards, terminations, truncations, info, obs) of each step."""
    rng = np.random.default_rng(seed)
    obs, info = envs.reset(seed=[seed, seed + 1])
    yield None, None, None, info, obs
    for _ in range(num_steps):
        actions = rng.integers(envs.single_action_space.n, size=envs.num_envs)
        obs, rewards, terminations, truncations, info = envs.step(actions)
        yield rewards, terminations, truncations, info, obs
    envs.close()


class Spy(gym.vector.VectorWrapper):
    """Keeps what each step returned."""

    def __init__(self, envs):
        super().__init__(envs)
        self.seen = []

    def step(self, actions):
        obs, rewards, terminations, truncations, info = self.env.step(actions)
        self.seen.append((obs.copy(), rewards.copy(), terminations.copy(), truncations.copy(), info))
        return obs, rewards, terminations, truncations, info


# ==== Whole games =================================================================================
@pytest.fixture(scope="module")
def history():
    """2600 steps of two games of BeamRider side by side: at least three whole games, none of them truncated."""
    return list(play(sprig_atari.make_envs(sprig_atari.Args(num_envs=2, threads=1)), 2600))


def test_lives_count_down_within_one_game_and_the_game_plays_on(history):
    for row in range(2):
        lives = [step[3]["lives"][row] for step in history]
        frames = [step[3]["episode_frame_number"][row] for step in history]
        assert lives[0] == 3
        first_end = next(t for t in range(1, len(lives)) if lives[t] > lives[t - 1])  # a new game has 3 again
        assert [n for n, m in zip(lives[:first_end], [0, *lives]) if n != m] == [3, 2, 1]
        assert all(b > a for a, b in zip(frames[:first_end], frames[1:first_end])), "a lost life restarted the game"
        lost = [t for t in range(1, first_end) if lives[t] < lives[t - 1]]
        for t in lost:
            assert history[t][1][row], "a lost life must terminate the learner's episode"
            assert not history[t][3].get("_episode", np.zeros(2, bool))[row], "a lost life is no end of the game"


def test_logged_returns_are_raw_sums_over_whole_games(history):
    games, wrong_if_clipped = 0, False
    for row in range(2):
        total = clipped = length = 0
        for t in range(1, len(history)):
            rewards, _, _, info, _ = history[t]
            total, clipped, length = total + rewards[row], clipped + np.sign(rewards[row]), length + 1
            new_game = info["lives"][row] > history[t - 1][3]["lives"][row]  # independent of the frame counter
            assert new_game == bool(info.get("_episode", np.zeros(2, bool))[row])
            if new_game:
                assert (info["episode"]["r"][row], info["episode"]["l"][row]) == (total, length)
                games, wrong_if_clipped = games + 1, wrong_if_clipped or clipped != total
                total = clipped = length = 0
    assert games >= 3 and wrong_if_clipped


BEAMRIDER = "BeamRiderNoFrameskip-v4"
DISTURBED = {"observation_noise": 0.2, "distractors": 2, "reward_delay": 20}


@pytest.mark.parametrize("switches", [{}, DISTURBED, {"clip_rewards": False}], ids=str)
@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", MINATAR, INVADERS])
@torch.no_grad()
def test_returns_at_each_kind_of_end(script, env_id, switches):
    """With λ = 0 a return is r + γ·V of what the action truly led to: the final observation where the game was cut,
    nothing where a life or the game was lost, the next observation of the same game elsewhere."""
    settings = {"num_envs": 2, "num_steps": 64, "max_episode_steps": 27, "threads": 1, "norm_adv": "none"}
    args = script.Args(env_id=env_id, gamma=0.5, gae_lambda=0.0, minibatch_size=64, **settings, **switches)
    leader, follower = script.make_agent(args, "cpu")
    torch.nn.init.normal_(follower.critic.weight)  # so that a wrong observation shows
    envs, first = script.begin_games(args, 0, 0)
    envs = Spy(envs)
    batch, after, games = script.collect_rollout(envs, first, leader, follower, args)
    obs, rewards, terminations, truncations, infos = zip(*envs.seen)
    envs.close()
    np.testing.assert_array_equal(batch.obs, np.concatenate([first, *obs[:-1]]))
    np.testing.assert_array_equal(after, obs[-1])
    led_to, expected_games = [x.copy() for x in obs], []
    for t, info in enumerate(infos):
        for row in np.flatnonzero(truncations[t]):
            led_to[t][row] = info["final_obs"][row]
            if not switches and env_id.startswith("Breakout"):  # the old game's stack has moved on by one
                np.testing.assert_array_equal(led_to[t][row][:-1], obs[t - 1][row][1:])
        for row in np.flatnonzero(info.get("_episode", ())):
            expected_games.append((t + 1, info["episode"]["r"][row], info["episode"]["l"][row]))
    assert games == expected_games and len(games) >= 2 and max(length for _, _, length in games) <= 27
    terminations, truncations = np.concatenate(terminations), np.concatenate(truncations)
    assert (terminations.sum() >= 2 or env_id == INVADERS) and (truncations.sum() >= 2 or env_id == MINATAR)
    assert max(r.max() for r in rewards) > 1 or args.reward_delay == 1 or env_id != INVADERS
    next_values = follower(leader(torch.from_numpy(np.concatenate(led_to))))[1]
    rewards = torch.from_numpy(np.concatenate(rewards))
    rewards = rewards.sign() if args.clip_rewards and args.reward_delay == 1 else rewards
    expected = rewards + 0.5 * next_values * ~torch.from_numpy(terminations)
    torch.testing.assert_close(batch.returns, expected.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.values, follower(leader(batch.obs))[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.advantages, batch.returns - batch.values)


def test_an_evaluation_plays_each_game_to_its_end(script):
    """Over lost lives (Breakout's first within 30 steps), one game each: the first ones to end would be short."""
    settings = {"env_id": "BreakoutNoFrameskip-v4", "threads": 1, "max_episode_steps": 60}
    args = script.Args(**settings, eval_episodes=3)
    scores = script.evaluate(*script.make_agent(args, "cpu"), args)
    assert scores["lengths"] == [60, 60, 60] and scores["mean"] == np.mean(scores["returns"])
    assert scores["protocol"] == script.env_protocol(args)


# ==== What is played ==============================================================================
def test_an_action_that_does_not_exist_raises_instead_of_hanging(script):
    envs = script.make_envs(script.Args(num_envs=2, threads=1))
    envs.reset(seed=[1, 2])
    for actions in ([0, 9], [-1, 0]):
        with pytest.raises(ValueError, match="outside 0..8"):
            envs.step(np.array(actions))
    envs.close()


@pytest.mark.parametrize(
    ("env_id", "game", "sticky", "actions"),
    [("PongNoFrameskip-v4", "pong", 0.0, 6), ("ALE/MsPacman-v5", "ms_pacman", 0.25, 9)],
)
def test_what_an_id_says_is_what_is_played(script, env_id, game, sticky, actions):
    emulator = script.env_protocol(script.Args(env_id=env_id))["emulator"]
    assert (emulator["game"], emulator["repeat_action_probability"]) == (game, sticky)
    assert emulator["max_num_frames_per_episode"] == 40_000 and emulator["frameskip"] == 4
    long = script.Args(env_id=env_id, max_episode_steps=10**6)
    assert script.env_protocol(long)["emulator"]["max_num_frames_per_episode"] == 108_000
    envs = script.make_envs(script.Args(env_id=env_id, num_envs=1, threads=1))
    assert envs.single_action_space.n == actions and envs.single_observation_space.shape == (4, 84, 84)
    envs.close()


UNKNOWN = {
    "Breakout": "ALE/Breakout-v5",
    "Pong": "ALE/Pong-v5",
    "MsPacman-v0": "ALE/MsPacman-v5",
    "CartPole-v1": "-v5",
    "MinAtar/Breakot-v1": "MinAtar/Breakout-v1",
}


@pytest.mark.parametrize("env_id", UNKNOWN)
def test_ids_of_neither_family_are_refused_with_a_suggestion(script, env_id):
    with pytest.raises(SystemExit) as error:
        script.env_protocol(script.Args(env_id=env_id))
    assert error.value.code.startswith(f"error: --env-id {env_id} ") and UNKNOWN[env_id] in error.value.code.split()[-1]
    assert "\n" not in error.value.code


def test_seeds_of_neighbouring_runs_and_of_all_uses_are_distinct(script):
    streams = [(0, 0), (0, 2048), (1,), (2,), (3,)]
    seeds = sum((script.env_seeds(s, *stream, num_envs=8) for s in range(50) for stream in streams), [])
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**31
    assert {type(seed) for seed in seeds} == {int}, "a numpy integer makes the emulator raise TypeError"


# ==== Robustness ==================================================================================
@pytest.mark.parametrize(("env_id", "clip_rewards"), [(BEAMRIDER, True), (BEAMRIDER, False), (INVADERS, True)])
def test_robustness_switches_disturb_what_is_seen_and_delay_what_is_paid(script, env_id, clip_rewards):
    common = {
        "env_id": env_id,
        "num_envs": 2,
        "max_episode_steps": 338 if env_id == BEAMRIDER else 40,
        "clip_rewards": clip_rewards,
        "threads": 1,
    }
    switches = {"observation_noise": 0.1, "distractors": 4, "reward_delay": 7}
    plain, disturbed = (list(play(script.make_envs(script.Args(**common, **more)), 360)) for more in ({}, switches))
    unpaid, games, delayed, noise, rows = np.zeros(2), 0, 0, [], []
    for (rewards, terms, truncs, info, obs), (paid, _, _, their_info, seen) in zip(plain[1:], disturbed[1:]):
        assert seen.dtype == np.uint8 and seen.shape == obs.shape
        noise.append(seen[..., 4:, :][obs[..., 4:, :] == 0].astype(int))
        rows.append(seen[..., :4, :].ravel())
        unpaid += np.sign(rewards) if clip_rewards else rewards  # one by one: a sum's sign would lose how many
        delayed += ((rewards != 0) & (paid == 0)).sum()
        ended = terms | truncs
        assert (paid[ended] == unpaid[ended]).all() and ((paid == unpaid) | (paid == 0)).all()
        unpaid[paid != 0] = 0
        for row in np.flatnonzero(info.get("_episode", ())):
            for key in ("r", "l"):
                assert info["episode"][key][row] == their_info["episode"][key][row], "logged returns are not touched"
            games += 1
            final, theirs = info["final_obs"][row], their_info["final_obs"][row]
            assert theirs.shape == final.shape and (theirs != final).mean() > 0.2, "the final observation is noisy, too"
    noise, rows = np.concatenate(noise), np.concatenate(rows)
    assert (noise**2).mean() == pytest.approx(0.5 * (0.1 * 255) ** 2, rel=0.02), "half of it is clipped at black"
    assert rows.mean() == pytest.approx(127.5, abs=1) and rows.std() == pytest.approx(73.9, abs=1)
    assert games >= 2 and delayed > 0


# ==== MinAtar =====================================================================================
@pytest.mark.parametrize(("game", "planes"), [("Breakout", 4), ("Asterix", 4), ("Seaquest", 10)])
def test_minatar_shows_the_games_own_planes_to_small_convolutions(script, game, planes):
    args = script.Args(env_id=f"MinAtar/{game}-v1", num_envs=2)
    history, terminated = list(play(script.make_envs(args), 300)), 0
    env, rng = gym.make(args.env_id), np.random.default_rng(3)
    assert env.unwrapped.game.sticky_action_prob == 0.1
    total, length = 0.0, 0
    expected, _ = env.reset(seed=3)
    for t, (reward, termination, _, info, obs) in enumerate(history):
        if t:
            expected, raw, over, _, _ = env.step(rng.integers(env.action_space.n, size=2)[0])
            total, length = total + raw, length + 1
            assert (raw, over) == (reward[0], termination[0])
            if over:
                assert (info["episode"]["r"][0], info["episode"]["l"][0]) == (total, length)
                final, (expected, _) = expected, env.reset()
                np.testing.assert_array_equal(info["final_obs"][0], 255 * final.transpose(2, 0, 1).astype(np.uint8))
                total, length, terminated = 0.0, 0, terminated + 1
        assert obs.shape == (2, planes, 10, 10) and obs.dtype == np.uint8
        np.testing.assert_array_equal(obs[0], 255 * expected.transpose(2, 0, 1).astype(np.uint8))
    assert terminated >= 1
    leader, follower = script.make_agent(args, "cpu")
    assert [conv.kernel_size for conv in leader.convs] == [(3, 3)] * 3 and leader.convs[0].in_channels == planes
    features = leader(torch.from_numpy(obs))
    assert features.shape == (2, leader.num_features) == (2, 512)
    assert follower(features)[0].shape == (2, env.action_space.n)


def test_minatar_is_asked_for_by_name_where_it_is_missing(script, monkeypatch):
    for module in ("minatar", "minatar.gym"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(gym.registry, MINATAR, raising=False)
    with pytest.raises(SystemExit) as error:
        script.env_protocol(script.Args(env_id=MINATAR))
    assert error.value.code.startswith(f"error: --env-id {MINATAR}") and "pip install minatar" in error.value.code
    assert "\n" not in error.value.code
