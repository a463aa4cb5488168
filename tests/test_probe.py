"""The linear probe: cases with known answers, the emulator's memory, and real (hardly trained) runs."""

import subprocess
import sys

import numpy as np
import probe
import pytest
import torch
from conftest import ROOT

import sprig_atari
import sprig_continuous


def test_probe_reads_what_is_linear_in_the_features_and_nothing_else():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 30)).astype(np.float32)
    targets = np.stack([features @ rng.normal(size=30), rng.normal(size=500), np.ones(500)], axis=1)
    linear, noise, constant = probe.probe(features, targets, np.arange(500) % 5 // 2)
    assert linear > 0.99 and noise < 0.1 and np.isnan(constant)


def test_the_own_ships_position_is_where_the_memory_says():
    def position(direction):
        game = probe.make_game(sprig_atari, sprig_atari.Args())
        actions = game.unwrapped.get_action_meanings()
        game.reset(seed=0)
        for action in ["FIRE"] * 40 + [direction] * 20:
            game.step(actions.index(action))
        return int(game.unwrapped.ale.getRAM()[probe.MEMORY["beam_rider"]["own position"]])

    assert position("LEFT") < position("NOOP") < position("RIGHT")


def test_a_game_is_seen_as_in_training():
    """The same kind of picture: of one size and brightness, not the emulator's own frame."""
    game = probe.make_game(sprig_atari, sprig_atari.Args())
    envs = sprig_atari.make_envs(sprig_atari.Args(num_envs=1))
    mine, theirs = game.reset(seed=3)[0], envs.reset(seed=3)[0][0]
    for _ in range(50):  # of idling: the start-up picture is over
        mine, theirs = game.step(0)[0], envs.step(np.zeros(1, dtype=int))[0][0]
    envs.close()
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    still = slice(70, 84)  # the ship at rest and the score board below it
    assert np.abs(mine[-1, still].astype(int) - theirs[-1, still]).mean() < 2


@pytest.mark.parametrize("script", [sprig_atari, sprig_continuous])
def test_real_runs_are_probed(script, tmp_path):
    atari = script is sprig_atari
    settings = {"num_envs": 2, "num_steps": 32, "minibatch_size": 32, "total_timesteps": 64, "eval_episodes": 0}
    settings |= {} if atari else {"env_id": "Pendulum-v1", "distractors": 2}
    script.main(script.Args(run_dir=str(tmp_path / "run"), threads=1, **settings))
    command = [sys.executable, "benchmark/probe.py", str(tmp_path / "run"), "--steps", "40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    if atari:
        assert [row[0] for row in rows[2:]] == [str(tmp_path / "run"), "sprig_atari.py, not trained", "pixels"]
    else:
        assert rows[2][1:3] == ["3", "2"] and all(0.3 < float(cell) < 5 / 3 for cell in rows[2][3:])
    torch.manual_seed(0)


def test_runs_that_cannot_be_probed_are_refused_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmark/probe.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
