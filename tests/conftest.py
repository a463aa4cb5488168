"""What the tests share: the scripts, small runs of them, and processes that can be killed."""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["OMP_NUM_THREADS"] = "1"  # one thread per test process: equal runs are then equal bit for bit

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_atari_baseline
import ppo_continuous_baseline
import sprig_atari
import sprig_continuous

ROOT = Path(__file__).parent.parent
TWINS = {"ppo_atari_baseline": ppo_atari_baseline, "sprig_atari": sprig_atari}
CONTINUOUS = {"ppo_continuous_baseline": ppo_continuous_baseline, "sprig_continuous": sprig_continuous}
# What holds for any script is tested on copies as well: FORKS="my_sprig my_atari" python -m pytest -k my_
forks = [name.removesuffix(".py") for name in os.environ.get("FORKS", "").replace(",", " ").split()]
FORKS = {name: importlib.import_module(name) for name in forks}
ATARI = TWINS | {name: fork for name, fork in FORKS.items() if hasattr(fork, "ale_py")}
VECTORS = CONTINUOUS | {name: fork for name, fork in FORKS.items() if name not in ATARI}
SCRIPTS = ATARI | VECTORS


def pytest_configure(config):
    config.addinivalue_line("markers", "learning: one seed has to learn; deselect with -m 'not learning'")


@pytest.fixture(params=ATARI.values(), ids=ATARI.keys())
def script(request):
    """Each script for pixels in turn."""
    return request.param


@pytest.fixture(params=SCRIPTS.values(), ids=SCRIPTS.keys())
def any_script(request):
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins alike, and leaves signals as they were (a run that ends with an error does not)."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # main sets it for the whole process
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - stable-baselines3 draws from it
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- Small runs --------------------------------------------------------------------------------------------------
SMALL = {"num_envs": 2, "num_steps": 32, "minibatch_size": 32, "update_epochs": 1, "max_episode_steps": 20}
SMALL |= {"total_timesteps": 384, "checkpoint_interval": 128, "eval_episodes": 2, "anneal_lr": False}
SMALL |= {"device": "cpu", "threads": 1}


def small(script, **changes):
    """Settings of a run that takes a second: six rollouts, a checkpoint after every other."""
    return SMALL | {"env_id": "MinAtar/Breakout-v1" if script.__name__ in ATARI else "Pendulum-v1"} | changes


def words(**settings):
    """As flags of a command line."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def resume(script, run, **changes):
    """In this process, with the arguments of the run."""
    return script.main(dataclasses.replace(script.read_args(run), resume=str(run), **changes))


def games(run):
    """Rows of episodes.csv as (agent_steps, return, length), without the seconds."""
    head, *rows = (run / "episodes.csv").read_text().splitlines()
    assert head == "agent_steps,seconds,episodic_return,episodic_length"
    cells = [row.split(",") for row in rows]
    return [(int(steps), float(score), int(length)) for steps, _, score, length in cells]


def weights(path):
    """name -> tensor, of both players."""
    state = torch.load(path, weights_only=True)
    return {f"{player}.{name}": x for player in ("leader", "follower") for name, x in state[player].items()}


def same(a, b):
    """Whether two files hold the same weights bit for bit."""
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(folder):
    """What is in a folder, to see that nothing has changed."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_end(a, b):
    """Two runs ended alike: weights bit for bit, games, evaluation."""
    assert games(a) == games(b)
    assert same(a / "model.pt", b / "model.pt") and same(a / "checkpoint.pt", b / "checkpoint.pt")
    assert json.loads((a / "evaluation.json").read_text()) == json.loads((b / "evaluation.json").read_text())


class Dice(gym.Env):
    """A task that draws from global generators, as none should and some do. Games last about 10 steps. The quadrant
    that is lit, or the entry, tells the action that is worth 1."""

    def __init__(self, planes=False, **options):
        self.planes = planes
        shape, high, dtype = ((10, 10, 2), 1, bool) if planes else ((4,), 1, np.float32)
        self.observation_space, self.action_space = gym.spaces.Box(0, high, shape, dtype), gym.spaces.Discrete(4)

    def show(self):
        self.right = random.randrange(4)
        obs = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        if self.planes:
            y, x = 5 * (self.right // 2), 5 * (self.right % 2)
            obs[y : y + 5, x : x + 5, 0] = True
        else:
            obs[self.right] = 1
        return obs

    def reset(self, *, seed=None, options=None):
        return self.show(), {}

    def step(self, action):
        reward = float(action == self.right)
        return self.show(), reward, bool(np.random.random() < 0.1), False, {}  # noqa: NPY002


gym.register("Dice-v0", Dice)
gym.register("MinAtar/Dice-v1", Dice, kwargs={"planes": True})


class Recorder(gym.Wrapper):
    """Keeps its own account of the games that are played."""

    def __init__(self, env, account):
        super().__init__(env)
        self.account, self.games, self.steps = account, [], 0
        account.envs.append(self)

    def reset(self, **options):
        self.score, self.length = 0.0, 0
        return self.env.reset(**options)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.score, self.length, self.steps = self.score + float(reward), self.length + 1, self.steps + 1
        self.account.steps += self.account.counts()
        self.account.actions.add(np.asarray(action).item())
        if terminated or truncated:
            self.games.append((self.score, self.length))
            self.account.games.append((self.account.steps, self.score, self.length))
        return obs, reward, terminated, truncated, info


@contextlib.contextmanager
def recorded(counts=lambda: True):
    """An account of what gymnasium.make makes: envs; games, each with the steps taken in all up to its end; actions.
    Steps are counted while `counts()` holds."""
    real, account = gym.make, SimpleNamespace(envs=[], games=[], steps=0, actions=set(), counts=counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym, "make", lambda *names, **options: Recorder(real(*names, **options), account))
        yield account


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """script -> its small run, left alone: run (its folder), args, evaluation, games (by the account)."""

    @functools.cache
    def play(script):
        run = tmp_path_factory.mktemp(script.__name__) / "run"
        args = script.Args(run_dir=str(run), **small(script))
        with recorded(run.exists) as account:  # before, the task is tried
            evaluation = script.main(args)
        training = [game for game in account.games if game[0] <= args.total_timesteps]
        games = [(-(-steps // args.num_envs) * args.num_envs, *game) for steps, *game in training]
        return SimpleNamespace(run=run, args=args, evaluation=evaluation, games=games)

    return play


# ---- Processes ---------------------------------------------------------------------------------------------------
def strike(path, count, *numbers):
    """Called in a run: sends it signals as it is about to open or rename a file whose name begins with `path` for the
    `count`-th time. So a test chooses the instant, whatever else the machine has to do."""
    seen = itertools.count(1)

    def hook(event, details):
        if event in ("open", "os.rename") and str(details[0]).startswith(str(path)) and next(seen) == count:
            for number in numbers:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def set_clock(seconds):
    """Called in a run: another machine, whose clock differs by `seconds`, and whose monotonic clock began elsewhere."""
    real = {name: getattr(time, name) for name in ("time", "time_ns", "monotonic")}
    time.time = lambda: real["time"]() + seconds
    time.time_ns = lambda: real["time_ns"]() + seconds * 10**9
    time.monotonic = lambda: real["monotonic"]() + 2 * seconds


def play(name, argv, folder, before):
    """`python name.py *argv`, in a process forked off one that has imported everything: a second instead of five."""
    for number in (1, 2):  # stdout, stderr
        path = os.readlink(path) if (path := folder / f"std{number}").is_symlink() else path
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr, sys.argv = open(1, "w"), open(2, "w"), [f"{name}.py", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers hand on that it is ignored
    for change in before:
        change()
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


class Process:
    """A script that runs beside the test. What is in `before` is called in it first, and can be pickled."""

    def __init__(self, script, folder, *argv, before=(), terminal=None):
        self.folder = folder / f"process{len(list(folder.glob('process*')))}"
        self.folder.mkdir()
        if terminal:
            (self.folder / "std2").symlink_to(os.ttyname(terminal))
        self.process = SERVER.Process(target=play, args=(script.__name__, argv, self.folder, before))
        with pytest.MonkeyPatch.context() as patch:  # where the server, if it is not there yet, looks for its modules
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
            self.process.start()

    def wait(self):
        """Returns (exit code, stdout, stderr)."""
        self.process.join(300)
        assert self.process.exitcode is not None, "it has not ended in five minutes"
        out, err = ((self.folder / f"std{n}") for n in (1, 2))
        return self.process.exitcode, out.read_text(), "" if err.is_symlink() else err.read_text()


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["conftest", "torch._dynamo", "minatar.gym", "gymnasium.envs.classic_control.pendulum"])
