"""The video shows what was seen, and all of it."""

import subprocess
import sys

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CONTINUOUS, ROOT

import watch


@pytest.fixture
def run(script, tmp_path):
    settings = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "max_episode_steps": 40}
    script.main(script.Args(run_dir=str(tmp_path / "run"), total_timesteps=32, eval_episodes=0, **settings))
    return tmp_path / "run"


def test_video_and_sheet_show_every_step_truthfully(script, run):
    video_path, sheet_path = watch.main(watch.Args(run, steps=25, sheet=4))
    script, args, leader, follower, envs = watch.load_run(run)
    moments = list(watch.play(script, args, leader, follower, envs, watch.Args(run, steps=25)))
    obs, _ = envs.reset(seed=script.env_seeds(0, 2, num_envs=1))  # the game's first observation
    envs.close()
    video = cv2.VideoCapture(str(video_path))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == len(moments) == 25
    received = leader.attention_received(torch.from_numpy(obs)) if hasattr(leader, "attention_received") else []
    num_layers = {"ppo_atari_baseline": 0, "sprig_atari": 3}.get(script.__name__, len(received))  # last: of a fork
    scale = 4 if num_layers else 8
    for step, moment in enumerate(moments):
        _, frame = video.read()
        assert len(moment.pictures) == 1 + num_layers
        assert sum(probability for _, probability, _ in moment.actions) == pytest.approx(1, abs=1e-5)
        seen = moment.pictures[0][1]
        shown = frame[watch.TITLE : watch.TITLE + 84 * scale, : 84 * scale]
        assert np.abs(shown.astype(int) - seen).mean() < 6, "the left picture is what was seen (compression aside)"
        if step == 0:
            first = frame
            np.testing.assert_array_equal(seen[::scale, ::scale, 0], obs[0, -1])
    small = cv2.resize(first, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    on_sheet = cv2.imread(str(sheet_path))[: small.shape[0], : small.shape[1]]
    assert np.abs(on_sheet.astype(int) - small).mean() < 6, "the sheet begins with the first frame"


def test_play_ends_with_the_game(script, run):
    script, args, leader, follower, envs = watch.load_run(run)
    assert args.max_episode_steps == 40
    assert len(list(watch.play(script, args, leader, follower, envs, watch.Args(run, steps=100)))) == 40
    envs.close()


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "CartPole-v1", "dm_control/cheetah-run-v0"])
def test_a_run_on_vectors_shows_environment_and_attention(name, env_id, tmp_path):
    script, run = CONTINUOUS[name], tmp_path / "run"
    settings = {"num_steps": 32, "minibatch_size": 16, "update_epochs": 1, "max_episode_steps": 30}
    script.main(script.Args(env_id=env_id, run_dir=str(run), total_timesteps=32, eval_episodes=0, **settings))
    command = [
        sys.executable,
        str(ROOT / "watch.py"),
        str(run),
        "--steps",
        "8",
    ]  # anew: how to draw is decided on import
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    if "cannot be rendered" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    video = cv2.VideoCapture(str(run / "watch.mp4"))
    frames = [video.read()[1] for _ in range(int(video.get(cv2.CAP_PROP_FRAME_COUNT)))]
    assert len(frames) == 8
    pictures = [frame[watch.TITLE : watch.TITLE + watch.SIDE, : watch.SIDE] for frame in frames]
    assert pictures[0].std() > 5 and not np.array_equal(pictures[0], pictures[-1]), "a picture that moves"
    assert (frames[0].shape[1] > 2.5 * watch.SIDE) == (name == "sprig_continuous"), "with the attention maps beside it"


@pytest.mark.parametrize("picture", ["rgba", "grey", "none"])
def test_whatever_a_task_renders_is_shown(picture, tmp_path, monkeypatch):
    """In colour, with alpha, or nothing at all if its constructor knows no render_mode."""

    class Task(gym.Env):
        metadata = {"render_modes": ["rgb_array"]}
        observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 0.0, False, False, {}

    class Rendered(Task):
        def __init__(self, render_mode=None):
            self.render_mode = render_mode

        def render(self):
            return np.full((60, 81, 4) if picture == "rgba" else (60, 81), 200, dtype=np.uint8)

    maker = Task if picture == "none" else Rendered
    monkeypatch.setitem(gym.registry, "Task-v0", gym.envs.registration.EnvSpec("Task-v0", maker, max_episode_steps=9))
    script, run = CONTINUOUS["ppo_continuous_baseline"], tmp_path / "run"
    settings = {"num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "eval_episodes": 0}
    script.main(script.Args(env_id="Task-v0", run_dir=str(run), total_timesteps=16, **settings))
    _, sheet = watch.main(watch.Args(run, steps=4, sheet=2))
    shades = cv2.imread(str(sheet))[60:150, 40:150]
    assert np.abs(shades.astype(int) - (60 if picture == "none" else 200)).max() < 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps and --sheet must be positive"),
        ({"fps": float("inf")}, "--fps must lie in"),
        ({"fps": float("nan")}, "--fps must lie in"),
        ({"seed": -1}, "--seed must lie in"),
    ],
)
def test_numbers_that_make_no_film_are_refused(changes, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        watch.main(watch.Args(tmp_path, **changes))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is not the folder of a run"):
        watch.main(watch.Args(tmp_path))
    (tmp_path / "args.json").write_text('{"script": "json.py"}')
    with pytest.raises(SystemExit, match="is a run of json.py, which is not in"):
        watch.main(watch.Args(tmp_path))
    (tmp_path / "args.json").write_text('{"script": "sprig_tabular.py"}')
    with pytest.raises(SystemExit, match="is a run of sprig_tabular.py, which cannot be watched"):
        watch.main(watch.Args(tmp_path))
