"""The emulator's traps, each on the real game."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import build


def play(envs, num_steps, seed=3):
    """Random actions; yields (rewards, terminations, truncations, info, obs) of each step."""
    rng = np.random.default_rng(seed)
    _, info = envs.reset(seed=seed)
    yield None, None, None, info, None
    for _ in range(num_steps):
        actions = rng.integers(envs.single_action_space.n, size=envs.num_envs)
        obs, rewards, terminations, truncations, info = envs.step(actions)
        yield rewards, terminations, truncations, info, obs


@pytest.fixture(scope="module")
def history():
    """2600 steps of two games side by side: at least three whole games, none of them truncated."""
    import sprig_atari

    envs = sprig_atari.make_envs(sprig_atari.Args(num_envs=2))
    steps = list(play(envs, 2600))
    envs.close()
    return steps


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


def test_truncation_after_max_episode_steps_with_a_real_final_observation(script):
    envs = script.make_envs(script.Args(num_envs=2, max_episode_steps=30))
    previous = None
    for t, (_, terminations, truncations, info, obs) in enumerate(play(envs, 30)):
        if t == 30:
            assert truncations.all() and not terminations.any() and info["_episode"].all()
            assert (info["episode"]["l"] == 30).all()
            final = info["final_obs"]
            assert final.shape == (2, 4, 84, 84) and final.dtype == np.uint8
            np.testing.assert_array_equal(final[:, :-1], previous[:, 1:])  # the old game's stack moved on by one
            assert not np.array_equal(obs[:, :-1], previous[:, 1:])
        elif t:
            assert not truncations.any() and "_episode" not in info
        previous = obs
    envs.close()


def test_rollout_bootstraps_from_the_true_final_observation(script):
    args = script.Args(num_envs=2, num_steps=24, max_episode_steps=20)
    envs = script.make_envs(args)
    seen = []

    class Spy(gym.vector.VectorWrapper):
        def step(self, actions):
            result = self.env.step(actions)
            seen.append((result[0].copy(), result[3].copy(), result[4].get("final_obs")))
            return result

    leader, follower, *_ = build(script, args)
    rollout = script.allocate_rollout(args, envs, torch.device("cpu"))
    obs, _ = envs.reset(seed=5)
    first = obs.copy()
    last_obs, games = script.collect_rollout(Spy(envs), obs, leader, follower, rollout)
    envs.close()

    def value(obs):
        with torch.no_grad():
            return follower(leader(torch.from_numpy(obs)))[1]

    np.testing.assert_array_equal(rollout.obs[0], first)
    np.testing.assert_array_equal(rollout.obs[20], seen[19][0])  # the next game's first observation
    assert seen[19][1].all(), "both games are truncated at step 20"
    torch.testing.assert_close(rollout.next_values[19], value(seen[19][2]), atol=1e-5, rtol=1e-4)
    assert (rollout.next_values[19] - rollout.values[20]).abs().max() > 1e-4
    torch.testing.assert_close(rollout.next_values[23], value(last_obs), atol=1e-5, rtol=1e-4)
    others = [t for t in range(23) if t != 19]
    assert torch.equal(rollout.next_values[others], rollout.values[[t + 1 for t in others]])
    assert rollout.dones[19].all() and not rollout.terminations.any() and rollout.dones.sum() == 2
    assert [(step, length) for step, _, length in games] == [(20, 20), (20, 20)]


def test_rollout_marks_a_lost_life_as_terminated(script):
    args = script.Args(num_envs=2, num_steps=700)
    envs = script.make_envs(args)
    leader, follower, *_ = build(script, args)
    rollout = script.allocate_rollout(args, envs, torch.device("cpu"))
    obs, _ = envs.reset(seed=5)
    _, games = script.collect_rollout(envs, obs, leader, follower, rollout)
    envs.close()
    assert rollout.terminations.sum() > len(games), "some life was lost without an end of the game"
    assert torch.equal(rollout.terminations, rollout.dones)
    assert rollout.rewards.max() > 1, "the rollout keeps raw rewards"
    assert set(script.learner_rewards(rollout, leader, args).unique().tolist()) <= {-1.0, 0.0, 1.0}
    raw = dataclasses.replace(args, clip_rewards=False)
    assert torch.equal(script.learner_rewards(rollout, leader, raw), rollout.rewards)


def test_one_and_two_threads_play_the_same_games(script):
    observations = []
    for threads in (1, 2):
        envs = script.make_envs(script.Args(num_envs=4, threads=threads))
        observations.append(np.stack([step[4] for step in play(envs, 120)][1:]))
        envs.close()
    np.testing.assert_array_equal(*observations)


def test_an_action_that_does_not_exist_raises_instead_of_hanging(script):
    envs = script.make_envs(script.Args(num_envs=2))
    envs.reset(seed=np.int64(1))  # a numpy integer is a seed like any other
    with pytest.raises(ValueError, match="outside 0..8"):
        envs.step(np.array([0, 9]))
    envs.close()


@pytest.mark.parametrize(
    ("env_id", "game", "sticky"),
    [("PongNoFrameskip-v4", "pong", 0.0), ("ALE/MsPacman-v5", "ms_pacman", 0.25)],
)
def test_protocol_is_read_from_the_id(script, env_id, game, sticky):
    protocol = script.env_protocol(script.Args(env_id=env_id))
    assert (protocol["game"], protocol["repeat_action_probability"]) == (game, sticky)
    assert protocol["max_frames_per_game"] == 40_000
    assert script.env_protocol(script.Args(env_id=env_id, max_episode_steps=10**6))["max_frames_per_game"] == 108_000


def test_seeds_of_neighbouring_runs_do_not_overlap(script):
    seeds = np.concatenate([script.env_seeds(s, stream, num_envs=8) for s in range(50) for stream in range(3)])
    assert len(np.unique(seeds)) == len(seeds) and seeds.min() >= 0 and seeds.max() < 2**31


def test_robustness_switches_disturb_what_is_seen_and_delay_what_is_paid(script):
    common = {"num_envs": 2, "max_episode_steps": 500}
    switches = {"observation_noise": 0.1, "distractors": 12, "reward_delay": 7}
    plain, disturbed, again = (
        list(play(script.make_envs(script.Args(**common, **more)), 510)) for more in ({}, switches, switches)
    )
    unpaid, games, delayed, noisy = np.zeros(2), 0, 0, []
    for t, ((rewards, terms, truncs, info, obs), step, repeated) in enumerate(zip(plain[1:], disturbed[1:], again[1:])):
        paid, seen = step[0], step[4]
        np.testing.assert_array_equal(seen, repeated[4])  # the noise, too, comes from the seed
        assert seen.dtype == np.uint8 and seen.shape == obs.shape
        difference = seen.astype(int) - obs
        inside = (obs[..., 12:, :] > 80) & (obs[..., 12:, :] < 175)  # where three deviations are not clipped
        noisy.append(difference[..., 12:, :][inside])
        if t % 50 == 0:
            assert seen[..., :12, :].mean() == pytest.approx(127.5, abs=3) and seen[..., :12, :].std() > 70
        unpaid += np.sign(rewards)  # clipped one by one: a sum's sign would lose how many there were
        delayed += ((rewards != 0) & (paid == 0)).sum()
        ended = terms | truncs
        assert (paid[ended] == unpaid[ended]).all() and ((paid == unpaid) | (paid == 0)).all()
        unpaid[paid != 0] = 0
        if "_episode" in info:
            assert (info["episode"]["r"] == step[3]["episode"]["r"]).all(), "logged returns are not touched"
            games += info["_episode"].sum()
            assert step[3]["final_obs"].shape == info["final_obs"].shape
    assert np.concatenate(noisy).std() == pytest.approx(0.1 * 255, rel=0.05)
    assert games >= 2 and delayed > 0
    for clip, delay, learns_from in ((True, 1, 1.0), (True, 7, 3.0), (False, 1, 3.0), (False, 7, 3.0)):
        args = script.Args(clip_rewards=clip, reward_delay=delay)
        rollout = script.Rollout(*(torch.full((2, 1), 3.0) for _ in range(8)))
        assert (script.learner_rewards(rollout, None, args) == learns_from).all(), "clipped once, before it is summed"


IMPOSSIBLE = [({"distractors": 85}, "84 rows"), ({"reward_delay": 0}, "must be"), ({"observation_noise": -1.0}, "must")]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_impossible_switches_are_refused(script, changes, message):
    with pytest.raises(SystemExit, match=message):
        script.main(script.Args(**changes))
