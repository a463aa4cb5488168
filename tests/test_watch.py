"""The video shows one game of a saved run as it is, and colours no more than what the gates let through."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT

import ppo_atari_baseline
import ppo_continuous_baseline
import sprig_atari
import sprig_continuous
import watch


def train(script, run_dir, env_id):
    sizes = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "max_episode_steps": 12}
    script.main(script.Args(run_dir=str(run_dir), env_id=env_id, total_timesteps=32, eval_episodes=0, **sizes))
    return run_dir


@pytest.fixture
def drawn(monkeypatch):
    """What each picture is drawn from: (figure, tiles, bars, line of text, entries, actions)."""
    calls, draw = [], watch.draw
    monkeypatch.setattr(watch, "draw", lambda *x: calls.append(x) or draw(*x))
    return calls


@pytest.mark.parametrize("script", [ppo_atari_baseline, sprig_atari], ids=lambda script: script.__name__)
@pytest.mark.parametrize("env_id", ["BeamRiderNoFrameskip-v4", "MinAtar/Breakout-v1"])
def test_one_game_of_pixels(script, env_id, tmp_path, drawn):
    run = train(script, tmp_path / "run", env_id)
    (run / "checkpoint.pt").unlink()  # an agent in a repository: args.json and model.pt
    watch.main(watch.Args(run, seed=3))
    video_path, sheet_path = run / "watch.mp4", run / "watch.png"
    args, *_ = script.load_agent(run)
    args.seed = 3
    envs, first = script.begin_games(args, 2, num_envs=1)  # the game's first observation
    envs.close()
    with imageio.get_reader(video_path) as video:
        frames, about = np.stack([frame for frame in video]), video.get_meta_data()
    assert (about["codec"], about["pix_fmt"][:7]) == ("h264", "yuv420p")
    assert len(frames) == len(drawn) <= 12, "one game, cut at 12 steps, and nothing of the next"
    picture = drawn[0][1][0][1]
    shown, seen = (picture.any(-1), first[0].any(0)) if "MinAtar" in env_id else (picture[..., 0], first[0, -1])
    np.testing.assert_array_equal(shown, seen)
    for _, tiles, bars, *_ in drawn:
        assert len(tiles) == (4 if script is sprig_atari else 1)
        assert sum(end - start for start, end, _ in bars) == pytest.approx(1, abs=1e-5), "probabilities"
    on_sheet = imageio.imread(sheet_path)[: frames.shape[1], : frames.shape[2], :3].astype(int)
    assert on_sheet.std() > 5 and np.abs(on_sheet - frames[0]).mean() < 6, "the sheet begins with the first picture"


@pytest.mark.parametrize(("pixels", "convs"), [(84, sprig_atari.NATURE_CNN), (10, sprig_atari.SMALL_CNN)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_colour_lies_at_the_centre_of_a_receptive_field(pixels, convs, depth):
    layers = [torch.nn.Conv2d(1, 1, kernel, stride) for _, kernel, stride in convs[:depth]]
    frame = torch.zeros(1, 1, pixels, pixels, requires_grad=True)
    output = torch.nn.Sequential(*layers)(frame)[0, 0]
    output[1, -1].backward()
    field = frame.grad[0, 0].nonzero().numpy()  # the pixels that this location depends on
    received = np.ones(output.shape)
    received[1, -1] = 9
    coloured = np.argwhere(watch.spread(received.ravel(), layers, pixels) == 9)
    np.testing.assert_allclose(coloured.mean(0), (field.min(0) + field.max(0)) / 2)


@torch.no_grad()
def test_what_a_closed_gate_holds_back_is_not_coloured():
    leader = sprig_atari.Leader(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), sprig_atari.Args())
    obs, grey, reddest = torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8), np.full((84, 84), 90.0), []
    torch.nn.init.normal_(leader.blocks[2].project.weight)  # each location looks at few others
    for gate in (0.0, 0.001, 1.0):
        torch.nn.init.constant_(leader.blocks[2].gate, gate)
        *_, (title, picture) = watch.attention_tiles(sprig_atari, leader, obs, grey)
        reddest.append(picture[..., 0].astype(int).max() - 90)
        assert "layer 3, entropy 0." in title and f"gate {gate:.3f}" in title and ("pale" in title) == (gate < 0.1)
        assert leader.blocks[2].gate.item() == pytest.approx(gate), "left as it was"
    assert reddest[0] == 0 < reddest[1] < 40 < reddest[2]


LABELS = {  # of the first action and of the first entry
    "CartPole-v1": ("push left", "position"),
    "HalfCheetah-v5": ("bthigh", "pos rootz"),
    "Humanoid-v5": ("abdomen_y", ""),
    "dm_control/cheetah-run-v0": ("action 0", "position 0"),
}


@pytest.mark.parametrize("env_id", LABELS)
def test_one_game_of_vectors(env_id, tmp_path, drawn):
    action, entry = LABELS[env_id]
    run = train(sprig_continuous, tmp_path / "run", env_id)
    (run / "model.pt").unlink()  # as if it were not finished
    watch.main(watch.Args(run, steps=3, output=tmp_path / "film"))
    figure, _, bars, state, *_ = drawn[-1]
    _, layer, *_, policy = ([label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes)
    assert policy[0].split("\n")[0] == action and [*layer, ""][0] == entry, "no carpet of names"
    assert state.startswith("step 3, score ") and all(0 <= end <= 1 for bar in bars for end in bar[:2])


class Task(gym.Env):  # cannot be rendered
    observation_space, action_space = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(0, 4, (2,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1.0, False, False, {}


def test_a_fork_on_a_wrapped_task_that_cannot_be_rendered(tmp_path, drawn, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copy(sprig_continuous.__file__, tmp_path / "a_fork.py")
    spec = gym.envs.registration.EnvSpec("Task-v0", lambda: gym.wrappers.RescaleAction(Task(), -2.0, 2.0))
    monkeypatch.setitem(gym.registry, "Task-v0", spec)
    watch.main(watch.Args(train(importlib.import_module("a_fork"), tmp_path / "run", "Task-v0")))
    _, tiles, bars, _, _, actions = drawn[0]
    assert len(drawn) == 12 and "cannot be rendered" in tiles[0][0] and actions == ["action 0", "action 1"]
    assert [start for start, *_ in bars] == [0.5, 0.5], "0 lies half way between the bounds that the agent meets"


def test_bad_input_is_refused_in_one_line_and_overwrites_nothing(tmp_path):
    def refused(*arguments):
        command = [sys.executable, watch.__file__, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    run = train(ppo_continuous_baseline, tmp_path / "run", "CartPole-v1")
    assert "is not a run" in refused(tmp_path / "nothing") and not (tmp_path / "nothing").exists()
    (tmp_path / "args.json").write_text('{"script": "sprig_tabular.py"}')
    assert "sprig_tabular" in refused(tmp_path)
    assert "--fps lie in" in refused(run, "--fps", "nan")
    assert "nothing was written" in refused(run, "--output", run / "args.json")
    assert not list(run.glob("*watch*"))


def test_the_agent_in_the_repository_scores_what_its_evaluation_says():
    agent = ROOT / "agents" / "breakout"
    args, leader, follower = sprig_atari.load_agent(agent)
    saved = json.loads((agent / "evaluation.json").read_text())
    played = sprig_atari.evaluate(leader, follower, replace(args, eval_episodes=30))
    assert played["protocol"] == saved["protocol"] and len(saved["returns"]) == 30
    # The same games on the machine that made it; elsewhere another rounding may end some of them otherwise.
    error = (saved["std"] ** 2 + played["std"] ** 2) ** 0.5 / 30**0.5
    assert abs(played["mean"] - saved["mean"]) < 3 * error and played["mean"] > 5  # random play: 0.5
