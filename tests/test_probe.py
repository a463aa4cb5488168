"""The linear probe: cases with known answers, the emulator's memory, and real (hardly trained) runs."""

import csv
import subprocess
import sys

import numpy as np
import probe
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import ROOT

import ppo_continuous_baseline
import sprig_atari
import sprig_continuous


def test_probe_reads_what_is_linear_in_the_features_and_nothing_else():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 30)).astype(np.float32)
    targets = np.stack([features @ rng.normal(size=30), rng.normal(size=500), np.ones(500)], axis=1)
    linear, noise, constant = probe.probe(features, targets, np.arange(500) % 5 // 2)
    assert linear > 0.99 and noise < 0.1 and np.isnan(constant)


def test_runs_that_differ_in_the_seed_make_one_row():
    rows = [["run", "a", "b"], ["runs/x-v1__a__1", "0.40", "12"], ["runs/x-v1__a__2", "0.60", "12"]]
    rows.append(["pixels", "constant", "3"])
    assert probe.over_seeds(rows)[1:] == [["runs/x-v1__a", "2", "0.50 ± 0.14", "12"], ["pixels", "1", "constant", "3"]]
    shorter = [["run", "a"], ["runs/x-v1__a__1", "7"], ["runs/x-v1__a__2", "10"], ["runs/x-v1__a__3", "13"]]
    assert probe.over_seeds(shorter)[1] == ["runs/x-v1__a", "3", "10 ± 3"]  # as many digits as they have
    rows[2][1] = "constant"
    assert probe.over_seeds(rows)[1] == ["runs/x-v1__a", "2", "0.40 (1 of 2)", "12"]
    assert probe.over_seeds(rows[:2]) == rows[:2]  # single runs are left as they are
    rows = [rows[0], *([f"runs/x-v1__sprig_atari__1__{time}", "0", "0"] for time in (100, 200))]
    assert probe.over_seeds(rows) == rows  # the scripts' own folders: what differs is the time


def test_the_own_ships_position_is_where_the_memory_says():
    def position(direction):
        game = probe.make_game(sprig_atari, sprig_atari.Args())
        actions = game.unwrapped.get_action_meanings()
        game.reset(seed=0)
        for action in ["FIRE"] * 40 + [direction] * 20:
            game.step(actions.index(action))
        return int(probe.MEMORY["beam_rider"]["own position"](game.unwrapped.ale.getRAM()))

    assert position("LEFT") < position("NOOP") < position("RIGHT")


def test_a_game_is_seen_as_in_training():
    game = probe.make_game(sprig_atari, sprig_atari.Args())
    envs = AtariVectorEnv("beam_rider", 1, noop_max=0, use_fire_reset=True, repeat_action_probability=0.0)
    mine, theirs = game.reset(seed=3)[0], envs.reset(seed=3)[0][0]
    for action in np.random.default_rng(0).integers(9, size=100):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert np.abs(mine.astype(int) - theirs).max() <= 1
        mine, theirs = game.step(action)[0], envs.step(np.array([action]))[0][0]
    envs.close()


@pytest.mark.parametrize("script", [sprig_atari, sprig_continuous, ppo_continuous_baseline])
def test_real_runs_are_probed(script, tmp_path):
    atari = script is sprig_atari
    settings = {
        "num_envs": 2,
        "num_steps": 32,
        "minibatch_size": 32,
        "total_timesteps": 64,
        "eval_episodes": 0,
        "device": "cpu",
    }
    settings |= {} if atari else {"env_id": "Pendulum-v1", "distractors": 2, "observation_noise": 0.1}
    script.main(script.Args(run_dir=str(tmp_path / "run"), threads=1, **settings))
    command = [sys.executable, "benchmark/probe.py", str(tmp_path / "run"), "--steps", "40"]
    command += ["--output", str(tmp_path / "probe.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert list(csv.reader((tmp_path / "probe.csv").open()))[1:] == rows[2:]
    if atari:
        assert [row[0] for row in rows[2:]] == [str(tmp_path / "run"), "sprig_atari.py, not trained", "pixels"]
    else:
        assert rows[2][1:3] == ["3", "2"] and len(rows[2]) == len(rows[0])
        if script is sprig_continuous:
            assert all(0.3 < float(cell) < 5 / 3 for cell in rows[2][3:])


@pytest.mark.parametrize("script", [sprig_atari, sprig_continuous])
def test_switching_attention_off_tells_what_it_does(script):
    args = script.Args(**({} if script is sprig_atari else {"env_id": "Pendulum-v1"}), num_envs=1)
    envs = script.make_envs(args)
    leader = script.Leader(envs.single_observation_space, args)
    follower = script.Follower(leader.num_features, envs.single_action_space)
    envs.close()
    settings = probe.Args([], steps=20, attention_off=True)
    for gate in getattr(leader, "layer_gates", ()):  # else no layer has a say, with or without attention
        torch.nn.init.constant_(gate, 0.5)
    cells = []
    for gate in (0.0, -0.25):
        for block in leader.blocks:
            torch.nn.init.constant_(block.gate, gate)
        _, (name, *numbers) = probe.attention_at_work({"x": (script, args, leader, follower)}, settings)
        cells.append([float(number) for number in numbers])
    assert cells[0][:3] == [0, 0, 0] and cells[0][6:] == [0, 0]
    assert cells[1][:3] == [25, 25, 25] and cells[1][6] > 1 and all(0.9 < entropy <= 1 for entropy in cells[1][3:6])
    assert not any(block.gate.any() for block in leader.blocks)  # they are switched off, and the agent is spent
    leader.blocks[0].gate = None
    with pytest.raises(SystemExit, match="x has no attention with a gate"):
        probe.attention_at_work({"x": (script, args, leader, follower)}, settings)


def test_an_enemy_shot_is_one_enemy_fewer():
    game = probe.make_game(sprig_atari, sprig_atari.Args())
    ale, enemies_left = game.unwrapped.ale, probe.MEMORY["beam_rider"]["enemies left in the sector"]
    rng, score, left = np.random.default_rng(0), 0, []
    game.reset(seed=0)
    for _ in range(600):
        _, reward, terminated, *_ = game.step(rng.choice([1, 7, 8]))
        score += reward
        left.append((score, int(enemies_left(ale.getRAM()))))
        if terminated:
            break
    assert left[0][1] == 15 and score >= 88
    assert all(enemies == 15 - points // 44 for points, enemies in left[:: len(left) // 10])
    memory = ale.getRAM()
    for byte, enemies in ((15, 15), (1, 1), (0, 0), (255, 0)):  # the last while the ship that ends a sector passes
        memory[84] = byte
        assert enemies_left(memory) == enemies


@pytest.mark.parametrize(
    "arguments", [["no/such/run"], [], ["x", "--steps", "0"], ["x", "--seed", "-1"], ["x", "--output", "README.md"]]
)
def test_bad_input_is_refused_in_one_line(arguments):
    command = [sys.executable, "benchmark/probe.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
