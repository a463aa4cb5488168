"""The video shows what was seen, and all of it."""

import cv2
import numpy as np
import pytest

import watch


@pytest.fixture
def run(script, tmp_path):
    settings = {"num_envs": 2, "num_steps": 16, "minibatch_size": 16, "update_epochs": 1, "max_episode_steps": 40}
    script.main(script.Args(run_dir=str(tmp_path / "run"), total_timesteps=32, eval_episodes=0, **settings))
    return tmp_path / "run"


def test_video_and_sheet_show_every_step_truthfully(script, run):
    video_path, sheet_path = watch.main(watch.Args(run, steps=25, sheet=4))
    _, _, leader, follower, envs = watch.load_run(run)
    moments = list(watch.play(script, leader, follower, envs, watch.Args(run, steps=25)))
    envs.close()
    video = cv2.VideoCapture(str(video_path))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == len(moments) == 25
    has_attention = script.__name__ == "sprig_atari"
    for obs, received, probabilities, *_ in moments:
        _, picture = video.read()
        assert [len(weights) for weights in received] == ([400, 81, 49] if has_attention else [])
        for weights in received:
            assert weights.mean() == pytest.approx(1, abs=1e-4)
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        scale = 4 if has_attention else 8
        shown = cv2.resize(picture[: 84 * scale, : 84 * scale, 0], (84, 84), interpolation=cv2.INTER_AREA)
        difference = np.abs(shown.astype(int) - obs[-1])
        assert difference[10:].mean() < 6, "the left picture is the newest frame (video compression aside)"
    assert cv2.imread(str(sheet_path)).size


def test_play_ends_with_the_game(script, run):
    _, args, leader, follower, envs = watch.load_run(run)
    assert args.max_episode_steps == 40
    assert len(list(watch.play(script, leader, follower, envs, watch.Args(run, steps=100)))) == 40
    envs.close()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is not the folder of a run"):
        watch.main(watch.Args(tmp_path))
    (tmp_path / "args.json").write_text('{"script": "json.py"}')
    with pytest.raises(SystemExit, match="is a run of json.py, which cannot be watched"):
        watch.main(watch.Args(tmp_path))
