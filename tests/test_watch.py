"""The video shows one game of a saved run as it is, and colours no more than what the gates let through."""

import importlib
import shutil
import subprocess
import sys

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import ppo_atari_baseline
import ppo_continuous_baseline
import sprig_atari
import sprig_continuous
import watch

SHORT = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "total_timesteps": 32}
SHORT |= {"eval_episodes": 0, "max_episode_steps": 12}


def train(script, folder, **changes):
    script.main(script.Args(run_dir=str(folder), **(SHORT | changes)))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What each picture is drawn from: the screen, its tiles, bars and line of text."""
    calls, draw = [], watch.Screen.draw
    monkeypatch.setattr(watch.Screen, "draw", lambda *x: calls.append(x) or draw(*x))
    return calls


@pytest.mark.parametrize("script", [ppo_atari_baseline, sprig_atari], ids=lambda script: script.__name__)
@pytest.mark.parametrize("env_id", ["BeamRiderNoFrameskip-v4", "MinAtar/Breakout-v1"])
def test_one_game_of_pixels(script, env_id, tmp_path, drawn):
    """Of a committed agent: args.json and model.pt are all that it has."""
    run, agent = train(script, tmp_path / "run", env_id=env_id), tmp_path / "agent"
    agent.mkdir()
    for name in ("args.json", "model.pt"):
        shutil.copy(run / name, agent)
    video_path, sheet_path = watch.main(watch.Args(agent, seed=3))
    args, *_ = script.load_agent(agent)
    args.seed = 3
    envs, first = script.begin_games(args, 2, num_envs=1)  # the game's first observation
    envs.close()

    with imageio.get_reader(video_path) as video:
        frames, about = np.stack([frame for frame in video]), video.get_meta_data()
    assert (about["codec"], about["pix_fmt"][:7]) == ("h264", "yuv420p")
    data = video_path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "a browser can play it before all of it has come"
    assert len(frames) == len(drawn) <= 12, "one game, cut at 12 steps, and nothing of the next"
    picture = drawn[0][1][0][1]
    wanted = first[0].any(0) if "MinAtar" in env_id else first[0, -1]
    np.testing.assert_array_equal(picture.any(-1) if picture.ndim == 3 else picture, wanted)
    for _, tiles, bars, _ in drawn:
        assert len(tiles) == (4 if script is sprig_atari else 1)
        assert sum(end - start for start, end, _ in bars) == pytest.approx(1, abs=1e-5), "probabilities"
    height, width = frames.shape[1:3]
    on_sheet = imageio.imread(sheet_path)[:height, :width, :3].astype(int)
    assert on_sheet.std() > 5 and np.abs(on_sheet - frames[0]).mean() < 6, "the sheet begins with the first picture"


@pytest.mark.parametrize("convs", [sprig_atari.NATURE_CNN, sprig_atari.SMALL_CNN])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_colour_lies_at_the_centre_of_a_receptive_field(convs, depth):
    layers = [torch.nn.Conv2d(1, 1, kernel, stride) for _, kernel, stride in convs[:depth]]
    pixels = 84 if convs is sprig_atari.NATURE_CNN else 10
    frame = torch.zeros(1, 1, pixels, pixels, requires_grad=True)
    output = torch.nn.Sequential(*layers)(frame)[0, 0]
    row, column = 1, len(output) - 1
    output[row, column].backward()
    received = np.ones(output.shape)
    received[row, column] = 9
    coloured = np.argwhere(watch.spread(received.ravel(), layers, pixels) == 9)
    field = frame.grad[0, 0].nonzero().numpy()
    np.testing.assert_allclose(coloured.mean(0), (field.min(0) + field.max(0)) / 2)
    assert len(coloured) == np.prod([stride for _, _, stride in convs[:depth]]) ** 2, "fields lie that far apart"


def test_what_a_closed_gate_holds_back_is_not_coloured():
    leader = sprig_atari.Leader(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), sprig_atari.Args())
    obs, grey, reddest = torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8), np.full((84, 84), 90.0), []
    torch.nn.init.normal_(leader.blocks[2].project.weight)  # each location looks at few others
    for gate in (0.0, 0.001, 1.0):
        torch.nn.init.constant_(leader.blocks[2].gate, gate)
        *_, (title, picture) = watch.attention_tiles(sprig_atari, leader, obs, grey)
        reddest.append(picture[..., 0].astype(int).max() - 90)
        assert title.startswith(f"layer 3, gate {gate:.3f}, entropy 0.") and ("pale" in title) == (gate < 0.1)
        assert leader.blocks[2].gate.item() == pytest.approx(gate), "left as it was"
    assert reddest[0] == 0 < reddest[1] < 40 < reddest[2]


@pytest.mark.parametrize("script", [ppo_continuous_baseline, sprig_continuous], ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("env_id", "action", "entry"),
    [
        ("CartPole-v1", "push left", "position"),
        ("HalfCheetah-v5", "bthigh\n[-1, 1]", "pos rootz"),
        ("dm_control/cheetah-run-v0", "bthigh\n[-1, 1]", "position 0"),
        ("Humanoid-v5", "abdomen_y\n[-0.4, 0.4]", "pos x22"),
    ],
)
def test_one_game_of_vectors(script, env_id, action, entry, tmp_path, drawn):
    run = train(script, tmp_path / "run", env_id=env_id)
    (run / "model.pt").unlink()  # as if it were not finished
    watch.main(watch.Args(run, steps=3, output=tmp_path / "film"))
    assert {path.name for path in (tmp_path / "film").iterdir()} == {"watch.mp4", "watch.png"}
    screen, tiles, bars, state = drawn[-1]
    policy, *maps = reversed(screen.figure.axes)
    assert policy.get_xticklabels()[0].get_text() == action and state.startswith("step 3, score ")
    assert all(0 <= end <= 1 for bar in bars for end in bar[:2])
    if script is sprig_continuous:
        assert [axes.get_xticklabels()[0].get_text() for axes in maps[:-1]] == [entry] * 3
        assert all(len(axes.get_xticklabels()) <= 28 for axes in maps), "no carpet of names"


class Task(gym.Env):
    """Shows three entries, takes an action in [0, 4]²; cannot be rendered."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(0, 4, (2,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1.0, False, False, {}


def test_a_fork_on_a_wrapped_task_that_cannot_be_rendered(tmp_path, drawn, monkeypatch, capsys):
    monkeypatch.setattr(watch, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copy(sprig_continuous.__file__, tmp_path / "my_sprig.py")
    fork = importlib.import_module("my_sprig")
    monkeypatch.setitem(sys.modules, "my_sprig", fork)  # forgotten at the end

    def make():
        return gym.wrappers.RescaleAction(Task(), -2.0, 2.0)

    monkeypatch.setitem(gym.registry, "Task-v0", gym.envs.registration.EnvSpec("Task-v0", make))
    watch.main(watch.Args(train(fork, tmp_path / "run", env_id="Task-v0")))
    assert "warning: the environment cannot be rendered" in capsys.readouterr().err and len(drawn) == 12
    screen, tiles, bars, _ = drawn[0]
    labels = [label.get_text() for label in screen.figure.axes[-1].get_xticklabels()]
    assert labels == ["action 0\n[-2, 2]", "action 1\n[-2, 2]"], "bounds as the agent meets them"
    assert [start for start, _, _ in bars] == [0.5, 0.5], "0 lies half way"
    assert [label.get_text() for label in screen.figure.axes[1].get_yticklabels()] == ["entry 0", "entry 1", "entry 2"]


def test_bad_input_is_refused_in_one_line_and_overwrites_nothing(tmp_path, capfd):
    def refused(*arguments, status=1):
        command = [sys.executable, watch.__file__, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == status and len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    assert "is not the folder of a run" in refused(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "args.json").write_text('{"script": "sprig_tabular.py"}')
    assert "none of the scripts" in refused(tmp_path)
    run = train(ppo_continuous_baseline, tmp_path / "run", env_id="CartPole-v1")
    assert "--fps lie in" in refused(run, "--fps", "nan")
    (run / "watch.png").write_text("my own")
    assert "would be overwritten" in refused(run)
    assert (run / "watch.png").read_text() == "my own" and not (run / "watch.mp4").exists()
    assert "args.json cannot be written" in refused(run, "--output", run / "args.json")
    film = tmp_path / "film"
    for seed in (0, 1):  # the second replaces the first
        video_path, *_, gif_path = watch.main(watch.Args(run, steps=8, output=film, gif=True, seed=seed))
    assert len(imageio.mimread(gif_path)) >= 2 and sorted(film.iterdir()) == [gif_path, video_path, film / "watch.png"]
