"""Several processes under torchrun train as one would."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import CONTINUOUS, ROOT, TWINS, build, random_batch
from test_runs import scalars

import ppo_atari_baseline
import sprig_atari

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def one_update(script, settings, rank, num_processes):
    """An update on this process's part of a batch that is the same everywhere. Returns weights and metrics."""
    args = script.Args(minibatch_size=32 // num_processes, update_epochs=2, learning_rate=1e-4, **settings)
    torch.set_num_threads(1)  # the order of sums, and so the rounding, depends on it
    torch.manual_seed(5)
    leader, follower, *optimizers = build(script, args)
    batch = random_batch(script, leader, follower, 32)
    mine = script.Batch(*(column.chunk(num_processes)[rank] for column in batch))
    info = script.update(leader, follower, *optimizers, mine, args)
    return [p.detach() for module in (leader, follower) for p in module.parameters()], info


def one_process(rank, num_processes, name, settings, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_processes)
    script = {"sprig_atari": sprig_atari, "ppo_atari_baseline": ppo_atari_baseline}[name]
    torch.save(one_update(script, settings, rank, num_processes), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ppo_atari_baseline", {"norm_adv": "minibatch"}),
        ("sprig_atari", {"cost_rows": 0, "perception_cost_weight": 0.1}),
        ("sprig_atari", {"update": "joint"}),
        ("sprig_atari", {"cost_rows": 0, "leader_gradient": "unrolled", "unroll_steps": 2, "unroll_step_size": 1e-3}),
        ("sprig_atari", {"cost_rows": 0, "leader_gradient": "implicit", "implicit_damping": 500.0}),
    ],
    ids=["ppo", "sprig", "joint", "unrolled", "implicit"],
)
def test_two_processes_update_like_one(name, settings, tmp_path):
    threads = torch.get_num_threads()
    expected, expected_info = one_update(TWINS[name], settings, 0, 1)
    torch.set_num_threads(threads)
    mp.spawn(one_process, args=(2, name, settings, str(tmp_path)), nprocs=2)
    for rank in range(2):
        weights, info = torch.load(tmp_path / f"{rank}.pt")
        for a, b in zip(weights, expected):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        for tag in expected_info:
            if "attention_entropy" not in tag:  # of one process's observations
                assert info[tag] == pytest.approx(expected_info[tag], abs=1e-4), tag


def observe_part(rank, num_processes, data, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_processes)
    moments = CONTINUOUS["sprig_continuous"].RunningMoments(3)
    for part in data:
        moments.observe(part.chunk(num_processes)[rank])
    torch.save(moments.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_observe_like_one(tmp_path):
    data = [torch.randn(20, 3) * 5 + 40, torch.randn(60, 3)]
    mp.spawn(observe_part, args=(2, data, str(tmp_path)), nprocs=2)
    everything = torch.cat(data)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        assert state["count"] == 80
        torch.testing.assert_close(state["mean"], everything.mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(state["var"], everything.var(0, correction=0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", [*TWINS, "sprig_continuous"])
def test_torchrun_trains_and_resumes(name, tmp_path):
    def run(*flags):
        command = [*TORCHRUN, "--nproc-per-node=2", str(ROOT / f"{name}.py"), *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    settings = {"num-envs": 4, "num-steps": 16, "minibatch-size": 16, "max-episode-steps": 20, "eval-episodes": 1}
    settings |= {"device": "cpu"}  # there may be a single GPU
    if name in CONTINUOUS:
        settings |= {"env-id": "Pendulum-v1"}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    first = run(*flags, f"--run-dir={tmp_path}/run", "--total-timesteps=128")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("evaluation over 1 games") == 1, "the first process alone reports"
    assert len(scalars(tmp_path / "run")["charts/episodic_return"]) == 4, "the games of both processes are logged"
    if name in CONTINUOUS:
        normaliser = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["leader"]
        assert normaliser["normaliser.entries.count"] == 128, "the observations of both processes count"
    again = run(f"--resume={tmp_path}/run", "--total-timesteps=192")
    assert again.returncode == 0, again.stderr
    assert [step for step, _ in scalars(tmp_path / "run")["losses/entropy"]] == [64, 128, 192]
    alone = [sys.executable, str(ROOT / f"{name}.py"), f"--resume={tmp_path}/run", "--total-timesteps=256"]
    refused = subprocess.run(alone, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "trained by 2 process(es), not 1" in refused.stderr


DRIVER = """
import importlib, os, sys
script = importlib.import_module(sys.argv[1])
sizes = {"num_envs": 3, "num_steps": 8, "minibatch_size": 24, "total_timesteps": 24, "eval_episodes": 0}
script.main(script.Args(run_dir=sys.argv[2], env_id=sys.argv[3], device="cpu", **sizes))
threads = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not any("gloo" in thread for thread in threads), threads
"""


@pytest.mark.parametrize("name", [*TWINS, *CONTINUOUS])
def test_three_processes_draw_numbers_of_their_own_and_leave_no_thread(name, tmp_path):
    """A thread of gloo's that is left when Python ends can abort its process, and torchrun then kills the others."""
    (tmp_path / "driver.py").write_text(DRIVER)
    task = "Pendulum-v1" if name in CONTINUOUS else "ALE/Pong-v5"
    command = [*TORCHRUN, "--nproc-per-node=3", str(tmp_path / "driver.py"), name, str(tmp_path / "run"), task]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    for step in (0, 24):
        state = torch.load(tmp_path / "run" / f"checkpoint-{step}.pt", weights_only=True)
        generators = [torch.Generator().set_state(mine["cpu"]) for mine in state["random"]]
        draws = [tuple(torch.rand(3, generator=generator).tolist()) for generator in generators]
        assert len(set(draws)) == 3, step


LATECOMER = """
import dataclasses, importlib, os, sys
script = importlib.import_module(sys.argv[1])
load = script.load_checkpoint


def load_older(run_dir, parts):
    state = load(run_dir, parts)
    state["progress"]["global_step"] -= 24 * (os.environ["RANK"] == "1")
    return state


script.load_checkpoint = load_older
script.main(dataclasses.replace(script.read_args(script.Path(sys.argv[2])), resume=sys.argv[2]))
"""


def test_what_one_process_finds_wrong_ends_all_of_them(tmp_path):
    def run(driver, *words):
        (tmp_path / "driver.py").write_text(driver)
        command = [*TORCHRUN, "--nproc-per-node=3", str(tmp_path / "driver.py"), "ppo_continuous_baseline", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    assert run(DRIVER, str(tmp_path / "run"), "Pendulum-v1").returncode == 0
    again = run(DRIVER, str(tmp_path / "run"), "Pendulum-v1")
    assert again.returncode == 1 and again.stderr.count("is not empty; name a new folder") == 1
    assert "Connection closed by peer" not in again.stderr, "the others waited for the first"
    apart = run(LATECOMER, str(tmp_path / "run"))
    assert apart.returncode == 1 and "different checkpoints" in apart.stderr and "of steps [0, 24]" in apart.stderr


def test_games_are_split_without_overlap(script):
    seeds = script.env_seeds(1, 0, 0, num_envs=8)
    played = []
    for rank in range(2):

        class Envs:
            num_envs = 4

            def reset(self, seed):
                played.extend(seed)
                return None, {}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "processes", lambda rank=rank: (rank, 2))
            script.restart(Envs(), script.Args(), 0)
    assert played == seeds.tolist()
