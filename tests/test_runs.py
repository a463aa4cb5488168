"""Whole runs of `main`: they learn, repeat themselves, and refuse bad input."""

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import time

import pytest
import torch
from conftest import CONTINUOUS, ROOT, TWINS
from patch_task import PatchEnvs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = {"total_timesteps": 128, "num_envs": 2, "num_steps": 32, "minibatch_size": 32, "eval_episodes": 0}
SMALL |= {"device": "cpu"}  # where equal runs are equal bit for bit; tests/test_gpu.py is for GPUs


def scalars(run_dir):
    """Tag -> [(step, value)], without the one that measures time."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag != "charts/SPS"
    }


@pytest.mark.parametrize("shuffled", [False, True], ids=["rewarded", "shuffled"])
def test_learns_where_things_are(script, tmp_path, monkeypatch, shuffled):
    monkeypatch.setattr(script, "make_envs", lambda args: PatchEnvs(args.num_envs, shuffled))
    args = script.Args(
        run_dir=str(tmp_path / "run"), total_timesteps=1024 if shuffled else 2048, num_steps=32,
        learning_rate=3e-4, gamma=0.5, eval_episodes=20, device="cpu",
    )  # fmt: skip
    evaluation = script.main(args)
    if not shuffled:
        assert evaluation["mean"] > 0.9 * PatchEnvs.optimum
        return
    # The control: judged by the true rule, a policy trained on random rewards is at chance.
    monkeypatch.setattr(script, "make_envs", lambda args: PatchEnvs(args.num_envs))
    envs = PatchEnvs(20)
    leader = script.Leader(envs.single_observation_space, args)
    follower = script.Follower(leader.num_features, envs.single_action_space)
    model = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    leader.load_state_dict(model["leader"])
    follower.load_state_dict(model["follower"])
    assert script.evaluate(leader, follower, args, torch.device("cpu"))["mean"] < 0.5 * PatchEnvs.optimum


def test_same_seed_writes_the_same_scalars_and_weights(script, tmp_path):
    for name in ("a", "b", "c"):
        script.main(
            script.Args(run_dir=str(tmp_path / name), seed=2 if name == "c" else 1, max_episode_steps=20, **SMALL)
        )
    a, b, c = (scalars(tmp_path / name) for name in ("a", "b", "c"))
    assert a == b and a != c
    assert len(a["losses/value_loss"]) == 2 and len(a["charts/episodic_return"]) == 6
    a, b = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("a", "b"))
    for player in ("leader", "follower"):
        assert all(torch.equal(a[player][key], b[player][key]) for key in a[player])


def test_a_run_leaves_what_it_promises(script, tmp_path):
    args = script.Args(
        run_dir=str(tmp_path), env_id="ALE/Breakout-v5", anneal_lr=True, clip_value_loss=True,
        **{**SMALL, "eval_episodes": 2}, max_episode_steps=60,
    )  # fmt: skip
    evaluation = script.main(args)
    record = json.loads((tmp_path / "args.json").read_text())
    assert record["arguments"]["gamma"] == 0.99 and record["versions"]["torch"]
    text = (ROOT / f"{script.__name__}.py").read_bytes()
    assert record["versions"]["script"] == hashlib.sha256(text).hexdigest()[:12]
    assert record["protocol"]["repeat_action_probability"] == 0.25 and record["protocol"]["max_frames_per_game"] == 240
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation
    assert len(evaluation["returns"]) == len(evaluation["lengths"]) == 2 and max(evaluation["lengths"]) <= 60
    logged = scalars(tmp_path)
    assert [value for _, value in logged["charts/learning_rate"]] == pytest.approx([1e-4, 5e-5])
    promised = "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()
    assert {f"losses/{name}" for name in promised} <= set(logged)


def test_evaluation_is_repeatable_and_counts_each_game_once(script, tmp_path):
    args = script.Args(eval_episodes=3, max_episode_steps=40)
    envs = script.make_envs(args)
    leader = script.Leader(envs.single_observation_space, args)
    follower = script.Follower(leader.num_features, envs.single_action_space)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (script.evaluate(leader, follower, args, torch.device("cpu")) for _ in range(2))
    assert first == second and first["lengths"] == [40, 40, 40]
    assert torch.equal(state, torch.get_rng_state())


BAD = {
    "unknown id": ({"env_id": "BeamRidrNoFrameskip-v4"}, "Did you mean: `BeamRiderNoFrameskip`"),
    "not Atari": ({"env_id": "CartPole-v1"}, "not an Atari game"),
    "random skip": ({"env_id": "BeamRider-v4"}, "random number of frames"),
    "indivisible": ({"minibatch_size": 100}, "does not divide"),
    "zero": ({"num_envs": 0}, "--num-envs must be at least 1"),
    "negative": ({"num_steps": -1}, "--num-steps must be at least 1"),
    "negative seed": ({"seed": -1}, "--seed must not be negative"),
    "no learning": ({"learning_rate": 0.0}, "--learning-rate must be positive"),
    "nan": ({"learning_rate": float("nan")}, "--learning-rate must be positive"),
    "infinite": ({"vf_coef": float("inf")}, "--vf-coef must be finite"),
    "gamma": ({"gamma": 1.5}, "--gamma must lie in"),
    "too short": ({"total_timesteps": 2047}, "less than one rollout"),
    "nothing to normalise over": ({"norm_adv": "minibatch", "minibatch_size": 1}, "cannot normalise over a single"),
    "seed too large": ({"seed": 2**40}, "--seed must be less than"),
    "too many threads": ({"threads": 100_000}, "--threads 100000 is more than"),
    "no computer": ({"device": "meta"}, "is not a CPU or a GPU"),
    "no such device": ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
    "nonsense device": ({"device": "abacus"}, "--device abacus cannot be used"),
    "a word for a number": ({"num_envs": "2"}, "--num-envs must be int, not '2'"),
    "no such choice": ({"norm_adv": "all"}, "--norm-adv must be rollout or minibatch or none, not 'all'"),
    "folder is a file": ({"run_dir": "/dev/null/run"}, "cannot be written"),
    "folder cannot be written": ({"run_dir": "/proc/run"}, "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(script, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, message = BAD[case]
    start = time.perf_counter()
    with pytest.raises(SystemExit) as error:
        script.main(script.Args(**changes))
    assert message in error.value.code and error.value.code.startswith("error: ") and "\n" not in error.value.code
    assert time.perf_counter() - start < 5
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("update", ["joint", "stopped", "separate"])
def test_a_setting_of_a_loss_that_is_not_there_is_refused(update):
    """Or an ablation would report arms that are one and the same as two."""
    script = TWINS["sprig_atari"]
    for flag, value in {"leader_value_coef": 0.5, "perception_cost": "l1", "cooperation_weight": 0.1}.items():
        with pytest.raises(SystemExit, match=f"--{flag.replace('_', '-')} would do nothing here: --update {update}"):
            script.check_args(script.Args(update=update, **{flag: value}))
    script.check_args(script.Args(update=update, perception_cost="l1", perception_cost_in_reward=True))


@pytest.mark.parametrize("name", ["sprig_atari", "sprig_continuous"])
@pytest.mark.parametrize(
    ("flag", "settings"),
    {
        "cost-rows": {"perception_cost": "concentration", "cost_rows": 5},
        "perception-cost": {"attention": "none", "perception_cost": "l1"},
        "perception-cost-weight": {"attention": "none", "perception_cost_weight": 1.0},
    }.items(),
)
def test_a_setting_of_attention_that_is_not_read_is_refused(name, flag, settings):
    script = (TWINS | CONTINUOUS)[name]
    with pytest.raises(SystemExit, match=f"--{flag} would do nothing here"):
        script.check_args(script.Args(**settings))


def test_a_gpu_has_a_number_and_each_process_its_own(script, monkeypatch):
    assert script.pick_device("cuda") == torch.device("cuda:0"), "torch.cuda.set_device takes no other"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert script.pick_device("cuda") == torch.device("cuda:3") and script.pick_device("cpu").type == "cpu"


def test_what_one_process_alone_finds_wrong_is_said(script, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match=r"error: --gamma must lie in .* \(process 1\)$"):
        script.check_args(script.Args(gamma=2.0))


def test_a_launcher_that_says_only_half_is_refused(script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit, match="error: WORLD_SIZE is set, but not all .* start with torchrun"):
        script.main(script.Args())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_cooperation_weight_outside_0_1_is_refused(alpha):
    script = TWINS["sprig_atari"]
    with pytest.raises(SystemExit, match="--cooperation-weight must lie in"):
        script.main(script.Args(cooperation_weight=alpha))


def test_losses_that_are_not_finite_are_found_at_the_end_of_an_update_at_the_latest(script):
    """The only check of them on a GPU: gradients whose norm overflows are scaled to 0 and leave no other trace."""
    infinite = torch.tensor(torch.inf)
    one = {"losses/value_loss": torch.tensor(1.0), "losses/grad_norm": torch.tensor(2.0), "losses/approx_kl": infinite}
    assert script.mean_info([one, one])["losses/grad_norm"] == 2
    for name in ("losses/value_loss", "losses/grad_norm"):
        with pytest.raises(FloatingPointError, match=f"{name} is not finite"):
            script.mean_info([one, one | {name: infinite}])


def test_compiling_what_cannot_be_compiled_is_refused(script, monkeypatch):
    if script is TWINS["sprig_atari"]:
        with pytest.raises(SystemExit, match="--compile has no second derivatives"):
            script.main(script.Args(compile=True, leader_gradient="unrolled"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"--compile needs a C\+\+ compiler, no-such-compiler"):
        script.main(script.Args(compile=True))


def test_cost_in_reward_without_attention_is_refused():
    script = TWINS["sprig_atari"]
    with pytest.raises(SystemExit, match="needs attention to pay for"):
        script.main(script.Args(perception_cost_in_reward=True, attention="none"))


def test_an_evaluation_asks_for_no_weights_and_biases_and_for_one_process(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        script.check_args(script.Args(track=True))
    script.check_args(script.Args(track=True, evaluate="runs/elsewhere"))
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    script.check_args(script.Args())
    with pytest.raises(SystemExit, match="plays in one process"):
        script.check_args(script.Args(evaluate="runs/elsewhere"))


def test_what_a_file_system_cannot_do_for_a_folder_ends_no_run(script, tmp_path, monkeypatch):
    sync = os.fsync

    def sync_files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_alone)
    script.write_json(tmp_path / "args.json", {"seed": 1})
    assert json.loads((tmp_path / "args.json").read_text()) == {"seed": 1}


def test_runs_started_in_the_same_second_get_folders_of_their_own(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    args = script.Args()
    folders = [script.start_run(args) for _ in range(3)]
    name = f"runs/BeamRiderNoFrameskip-v4__{script.__name__}__1__1000000000"
    assert list(map(str, folders)) == [name, f"{name}-1", f"{name}-2"]


def test_what_losses_report_is_known_by_its_name(script):
    one, two, three, four = map(torch.tensor, (1.0, 2.0, 3.0, 4.0))
    assert script.mean_info([{"a": one, "b": two}, {"b": four, "a": three}]) == {"a": 2, "b": 3}


def test_what_a_fork_freezes_stays_as_it_was(script, tmp_path, monkeypatch):
    class Frozen(script.Leader):
        def __init__(self, *inputs):
            super().__init__(*inputs)
            next(self.parameters()).requires_grad_(False)

    monkeypatch.setattr(script, "Leader", Frozen)
    script.main(script.Args(run_dir=str(tmp_path / "run"), **SMALL))
    files = [tmp_path / "run" / name for name in ("checkpoint-0.pt", "checkpoint-128.pt")]
    before, after = (list(torch.load(path, weights_only=True)["leader"].values()) for path in files)
    frozen, *others = map(torch.equal, before, after)
    assert frozen and not any(others)


@pytest.mark.parametrize("words", [["--resume", ""], ["--resume="], ["--evaluate", ""]], ids=str)
def test_an_empty_folder_name_does_not_start_a_run(script, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    with pytest.raises(SystemExit, match="needs the folder of a run, not an empty name"):
        script.parse_args()


def test_the_default_number_of_threads_does_not_depend_on_earlier_runs(script, tmp_path):
    with pytest.raises(SystemExit, match="is not empty"):
        (tmp_path / "taken").touch()
        script.main(script.Args(threads=script.DEFAULT_THREADS + 1, run_dir=str(tmp_path)))
    assert torch.get_num_threads() == script.DEFAULT_THREADS + 1
    with pytest.raises(SystemExit, match="is not empty"):
        script.main(script.Args(threads=0, run_dir=str(tmp_path)))
    assert torch.get_num_threads() == script.DEFAULT_THREADS


def test_nothing_is_overwritten(script, tmp_path):
    (tmp_path / "precious").write_text("result")
    with pytest.raises(SystemExit, match="not empty"):
        script.main(script.Args(run_dir=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("name", TWINS)
def test_a_mistake_on_the_command_line_exits_without_a_traceback(name, tmp_path):
    command = [sys.executable, ROOT / f"{name}.py", "--env-id", "CartPole-v1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0 and result.stdout == ""
    assert result.stderr.startswith("error: --env-id CartPole-v1") and result.stderr.count("\n") == 1
