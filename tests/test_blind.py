"""Players that see nothing, and blind copies of agents: real games, and policies whose numbers are known."""

import dataclasses
import math
import subprocess
import sys

import blind
import gait
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT

import ppo_atari_baseline
import sprig_continuous

SMALL = {"num_steps": 32, "minibatch_size": 32, "total_timesteps": 64, "eval_episodes": 0, "device": "cpu"}


def train(folder, env_id):
    sprig_continuous.main(sprig_continuous.Args(env_id=env_id, run_dir=str(folder), **SMALL))
    return folder


def test_entropy_in_nats():
    probabilities = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(blind.entropy(probabilities), torch.tensor([math.log(4), 0.0, math.log(2)]))


def test_who_holds_left_and_fire_scores_and_who_only_steers_does_not():
    script = ppo_atari_baseline
    args = script.Args(num_envs=2, threads=2, max_episode_steps=300)
    scores = {}
    for name, action in (("LEFT", 4), ("LEFTFIRE", 8)):
        returns, lengths = blind.play(script, args, 0, lambda obs, action=action: np.full(len(obs), action))
        scores[name] = returns.tolist()
        assert lengths.tolist() == [300, 300], "whole games, but for the limit"
    assert scores["LEFT"] == [0, 0] and min(scores["LEFTFIRE"]) >= 88  # two enemies


def test_a_policy_that_hardly_sees_has_no_information_and_one_that_sees_has(tmp_path, monkeypatch):
    run = train(tmp_path / "CartPole-v1__sprig__1", "CartPole-v1")
    settings = blind.Args(games=10, threads=1)
    _, own, copied, entropy, information = blind.beside_its_blind_copy(run, settings)
    assert 8 < float(own) < 60 and 8 < float(copied) < 60
    assert float(entropy) == pytest.approx(math.log(2), abs=0.02) and float(information) < 0.02
    load = blind.load_run

    def sighted(path):
        """Pushes the cart to where the pole leans."""
        script, args, leader, follower, envs = load(path)

        def lean(side):  # (B, 1): of the pole's angle and its speed
            return torch.cat([-50 * side, 50 * side], 1), side[:, 0]

        return script, args, lambda obs: obs[:, 2:3] + 0.2 * obs[:, 3:4], lean, envs

    monkeypatch.setattr(blind, "load_run", sighted)
    own, copied, entropy, information = map(float, blind.beside_its_blind_copy(run, settings)[1:])
    assert own > 100 and copied < 40 and entropy < 0.5 and information > 0.2


def test_real_valued_actions_and_bad_input_are_refused_in_one_line(tmp_path):
    run = train(tmp_path / "run", "Pendulum-v1")
    with pytest.raises(SystemExit, match="a blind copy needs choices"):
        blind.main(blind.Args(runs=[run], games=1, threads=1))
    (tmp_path / "there.csv").write_text("")
    for changes, message in (
        ({"games": 0}, "--games 0 is less than 1"),
        ({"output": tmp_path / "there.csv"}, "there.csv exists"),
        ({"runs": [tmp_path / "nothing"]}, "is not the folder of a run"),
        ({"env_id": "CartPole-v1"}, "is not an Atari game"),
    ):
        with pytest.raises(SystemExit, match=message) as error:
            blind.main(dataclasses.replace(blind.Args(), **changes))
        assert "\n" not in str(error.value)


def test_help_is_there():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmark" / "blind.py", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "--games" in done.stdout


def test_a_cheetah_on_its_back_is_known_by_its_pitch(tmp_path, monkeypatch):
    cheetah = gym.make("HalfCheetah-v5").unwrapped
    assert cheetah.model.joint(gait.PITCH + 1).name == "rooty", "observations leave out the first position"
    run = train(tmp_path / "HalfCheetah-v5__sprig__1", "HalfCheetah-v5")
    settings = gait.Args([run], games=2)
    monkeypatch.setattr(type(cheetah), "_get_obs", lambda self: np.full(17, np.pi))  # whatever it does
    assert gait.move(run, settings)[2:] == ["1.00", "1.00"]
    monkeypatch.undo()
    row = gait.move(run, settings)
    assert row[0] == str(run) and float(row[1]) < 0 and 0 <= float(row[3]) <= float(row[2]) < 1, "it has learnt nothing"
    with pytest.raises(SystemExit, match="was trained on CartPole-v1"):
        gait.move(train(tmp_path / "CartPole-v1__sprig__1", "CartPole-v1"), settings)


def test_gaits_are_counted_by_arm_and_compared_with_the_first():
    on_its_feet, on_its_back = ["3000", "0.10", "0.00"], ["1700", "0.98", "0.97"]
    arms = {"ppo": [on_its_back] * 10, "sprig": [on_its_feet] * 5 + [on_its_back] * 4 + [["900", "0.50", "0.40"]]}
    rows = [[f"runs/m/C__{arm}__{seed}", *row] for arm, agents in arms.items() for seed, row in enumerate(agents)]
    head, *table = gait.over_arms([["agent", "return", "steps on its back", "fewest"], *rows])
    assert [len(row) for row in table] == [len(head)] * 2
    assert table[0] == ["runs/m/C__ppo", "0 of 10", "", "", "0.98", "1700", ""]
    # Two-sided: either arm has all five of those on their feet, of the ways to choose 5 of 20.
    p = 2 * math.comb(10, 5) / math.comb(20, 5)
    assert table[1] == ["runs/m/C__sprig", "5 of 10", "0.10", "3000", "0.50 to 0.98", "900 to 1700", f"{p:.2g}"]
