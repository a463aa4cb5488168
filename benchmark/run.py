"""Play an experiment matrix: every script with its flags, on every task, from every seed.

    python benchmark/run.py benchmark/matrices/mujoco.toml --dry-run           # every run: its state, its command
    python benchmark/run.py benchmark/matrices/mujoco.toml                     # on this machine, all cores
    python benchmark/run.py benchmark/matrices/mujoco.toml --address HOST:6379 # on a Ray cluster
    sbatch --array=0-39 benchmark/slurm.sh benchmark/matrices/mujoco.toml      # one Slurm job per run, without Ray
    python benchmark/run.py MATRIX --collect RUN_DIR ...                       # add runs made by hand

A matrix is a TOML file (benchmark/matrices/ has examples): `question`, `tasks`, `seeds`, `cpus` and `gpus` of one run
(cpus is also its --threads; with 0 gpus it sees none), `[flags]` of every run, and `[arms.<label>]` with `title`,
`script` and `flags` of its own. A script is one of the four, or a fork of one: a copy beside them. The other keys are
for plot.py.

Each run is the ordinary script in a process of its own, in `<runs>/<matrix>/<task>__<label>__<seed>`; what it prints is
in a .log beside that. A finished run is exported to `<results>/<matrix>/<task>/`: its games as `<label>_seed<n>.csv.gz`
(the run's episodes.csv), its arguments, versions, hardware and evaluation as `<label>_seed<n>.json`. Both folders are
yours; the published results are those in benchmark/results.

Call the same command again as often as you like: what is finished is skipped, what was interrupted goes on from its
checkpoint and ends as if it had been left alone. A run that fails is tried once more, then listed, and the exit code is
1. What is there of a run with other flags, another task or another length than the matrix says is refused by name.
Ctrl-C and SIGTERM let every run save, then exit with 130; a second one does not wait for them.

On a cluster, and under Slurm, this folder, `runs` and `results` must lie on a file system that all machines share.
"""

import ctypes
import difflib
import fcntl
import gzip
import importlib
import itertools
import json
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro

LABEL = "[a-z0-9-]+"  # of an arm, and the name of a matrix
OWN_FLAGS = ("env_id", "seed", "run_dir", "resume", "evaluate", "threads")  # which this program sets (threads: cpus)
PARTS = ("Args", "MAY_CHANGE", "env_protocol", "main")  # of a script
TOP_KEYS = {"question": str, "tasks": list, "seeds": list, "cpus": int, "gpus": float, "flags": dict, "arms": dict}
TOP_KEYS |= {"saturated": list, "peers": dict, "contrasts": dict, "plan": dict, "primary": str}  # which plot.py reads
ARM_KEYS = {"title": str, "script": str, "flags": dict, "beginning_of": str}  # the last: plot.py
REQUIRED = ("question", "tasks", "seeds", "arms", "title", "script")


@dataclass
class Args:
    matrix: Annotated[Path, tyro.conf.Positional]
    """the matrix, a TOML file"""
    address: str | None = None
    """of a Ray cluster, HOST:PORT, or "auto" on one of its machines (default: this machine alone)"""
    runs: Path = Path("runs")
    """where the run folders are made"""
    results: Path = Path("results")
    """where finished runs are exported to"""
    only: int | None = None
    """play the run of this index alone, in this process, without Ray"""
    dry_run: bool = False
    """print all runs, their states and their commands, and do nothing"""
    collect: tuple[Path, ...] = ()
    """export these finished run folders as the matrix's runs of the same script, flags, task and seed; play nothing"""


@dataclass
class Run:
    index: int
    task: str
    label: str
    seed: int
    script: str
    arguments: dict[str, Any]  # of the script, by field name: those that the matrix sets
    values: dict[str, Any]  # all arguments, the script's defaults as well
    compared: set[str]  # those that decide what is learnt
    threads: int
    gpus: float
    folder: Path
    result: Path

    @property
    def name(self) -> str:
        return f"[{self.index}] {self.task} {self.label} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


def fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


# ==================================================================================================
# The matrix
# ==================================================================================================
def fits(value: Any, kind: Any) -> bool:
    """Whether a TOML value can stand for a field of this type. None, which TOML has not, is written "None"."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(value == "None" if member is types.NoneType else fits(value, member) for member in kind.__args__)
    return type(value) in ((int, float) if kind is float else (kind,))


def check_keys(table: Any, known: dict[str, type], where: str) -> None:
    if not isinstance(table, dict):
        fail(f"{where} is not a table")
    for key, value in table.items():
        if key not in known:
            fail(f"{where}: {key} is not a key; there are {', '.join(known)}")
        if not fits(value, known[key]):
            fail(f"{where}: {key} = {value!r} is not of type {known[key].__name__}")
    for key in known:
        if key not in table and key in REQUIRED:
            fail(f"{where}: {key} is missing")


def load_matrix(path: Path) -> dict[str, Any]:
    """What the file holds, its keys checked, without a look at the scripts. Ends with one line if it is not sound."""
    try:
        matrix = tomllib.loads(path.read_text())
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
    except ValueError as error:
        fail(f"{path} is not TOML: {error}")
    if not re.fullmatch(LABEL, path.stem):
        fail(f"{path}: the name of a matrix consists of a-z, 0-9 and -")
    check_keys(matrix, TOP_KEYS, str(path))
    matrix = {"cpus": 1, "gpus": 0.0, "flags": {}} | matrix
    for key, kind in (("tasks", str), ("seeds", int)):
        values = matrix[key]
        if not values or not all(fits(value, kind) for value in values) or len(set(values)) < len(values):
            fail(f"{path}: {key} = {values} is not a list of {kind.__name__}, at least one, each once")
    if matrix["cpus"] < 1 or not 0 <= matrix["gpus"] <= 1:
        fail(f"{path}: a run takes at least one of cpus, and gpus in [0, 1], not {matrix['cpus']}, {matrix['gpus']:g}")
    if not matrix["arms"]:
        fail(f"{path}: arms is empty")
    for label, arm in matrix["arms"].items():
        if not re.fullmatch(LABEL, label):
            fail(f"{path}: arms.{label}: a label consists of a-z, 0-9 and -")
        check_keys(arm, ARM_KEYS, f"{path}: arms.{label}")
    return matrix


def load_script(name: str, where: str) -> types.ModuleType:
    """One of the four, or a fork beside them, which has to have the same PARTS."""
    if not re.fullmatch(r"[a-zA-Z_]\w*\.py", name) or not (ROOT / name).is_file():
        fail(f"{where}: there is no script {name!r} in {ROOT}")
    try:
        script = importlib.import_module(Path(name).stem)
    except Exception as error:  # whatever is wrong with a fork
        fail(f"{where}: script {name!r} cannot be imported: {type(error).__name__}: {error}")
    if missing := [part for part in PARTS if not hasattr(script, part)]:
        fail(f"{where}: script {name!r} has no {missing[0]}; it should be one of the four or a fork of one")
    return script


def script_arguments(flags: dict[str, Any], script: types.ModuleType, where: str) -> dict[str, Any]:
    """Flags of the command line as fields of the script's Args. Refuses what the script does not have."""
    kinds = typing.get_type_hints(script.Args)
    arguments = {}
    for flag, value in flags.items():
        name = flag.replace("-", "_")
        if name in OWN_FLAGS:
            fail(f"{where}: --{flag} is not for the matrix to set")
        if name not in kinds or "_" in flag:
            near = difflib.get_close_matches(name, kinds, n=1)
            mend = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            fail(f"{where}: {script.__name__}.py has no flag --{flag}{mend}")
        if not fits(value, kinds[name]):
            kind = getattr(kinds[name], "__name__", str(kinds[name]))
            if choices := typing.get_args(kinds[name]) if kind == "Literal" else ():
                kind = "one of " + ", ".join(choices)
            fail(f"{where}: {flag} = {value!r}, but --{flag} takes {kind}")
        arguments[name] = None if value == "None" and kinds[name] is not str else value
    return arguments


def file_name(task: str) -> str:
    """Of a task's folders: its id, without what a file system does not take."""
    return task.replace("/", "-").replace(":", "-")


def result_path(results: Path, matrix: str, task: str, label: str, seed: int) -> Path:
    """The .json of a run; its .csv.gz lies beside it."""
    return results / matrix / file_name(task) / f"{label}_seed{seed}.json"


def plan_runs(path: Path, runs: Path, results: Path) -> list[Run]:
    """All runs of a matrix, those of the first seed first. Ends with one line if one of them could not be played."""
    matrix = load_matrix(path)
    plan, known = [], set()  # known: (script, task) whose protocol was looked up
    for seed, task, (label, arm) in itertools.product(matrix["seeds"], matrix["tasks"], matrix["arms"].items()):
        where = f"{path}: arms.{label}"
        script = load_script(arm["script"], where)
        arguments = script_arguments(matrix["flags"] | arm.get("flags", {}), script, where)
        if arguments.get("device", "auto") not in ("auto", "cpu") and not matrix["gpus"]:
            fail(f"{where}: device = {arguments['device']!r}, but gpus = 0")
        try:
            checked = script.Args(env_id=task, seed=seed, threads=matrix["cpus"], **arguments)
            if (arm["script"], task) not in known:
                script.env_protocol(checked)
                known.add((arm["script"], task))
        except (ValueError, SystemExit) as error:
            fail(f"{where}: {str(error).removeprefix('error: ')}")
        compared = vars(checked).keys() - script.MAY_CHANGE - {"run_dir", "checkpoint_interval", *OWN_FLAGS}
        compared |= {"env_id", "seed", "total_timesteps", *arguments} - {"device"}
        folder = runs / path.stem / f"{file_name(task)}__{label}__{seed}"
        result = result_path(results, path.stem, task, label, seed)
        values = dict(vars(checked))
        machine = matrix["cpus"], float(matrix["gpus"])
        plan.append(
            Run(len(plan), task, label, seed, arm["script"], arguments, values, compared, *machine, folder, result)
        )
    return plan


# ==================================================================================================
# What is there of a run
# ==================================================================================================
def difference(run: Run, path: Path) -> str:
    """How the run that wrote `path` differs from what the matrix says: one sentence, or ""."""
    try:
        record = json.loads(path.read_text())
        script, theirs = record["script"], dict(record["arguments"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} is damaged: {type(error).__name__}: {error}; move it away")
    if script != run.script:
        return f"{path} is of {script}, not of {run.script}"
    for name in sorted(run.compared):
        value = run.values[name]
        if theirs.get(name, "unknown" if name in run.arguments else value) != value:
            return f"{path} was made with --{name.replace('_', '-')} {theirs.get(name, 'unknown')}, not {value}"
    rollout = run.values["num_envs"] * run.values["num_steps"]
    if record.get("trained_steps", run.values["total_timesteps"]) < run.values["total_timesteps"] // rollout * rollout:
        return f"{path} has {record['trained_steps']} agent steps only"  # exported before it had ended
    return ""


def find_state(run: Run) -> str:
    """What of a run is there. Changes nothing."""
    record = run.folder / "args.json"
    if run.result.exists() and run.result.with_suffix(".csv.gz").exists():
        wrong = difference(run, run.result)
        return f"differs: {wrong}" if wrong else "done"
    if not (run.folder / "checkpoint.pt").exists():
        return "to do"
    if wrong := difference(run, record):
        return f"differs: {wrong}"
    if is_finished(run.folder, run.values["eval_episodes"]):
        return "finished, not exported"
    return f"interrupted at step {saved_step(run.folder)}"


def is_finished(folder: Path, eval_episodes: int) -> bool:
    return (folder / "model.pt").exists() and (eval_episodes == 0 or (folder / "evaluation.json").exists())


def saved_step(folder: Path) -> int:
    """Agent steps trained by the checkpoint."""
    import torch

    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception as error:  # torch has no one kind for them
        fail(f"{folder}/checkpoint.pt is damaged: {type(error).__name__}; move the folder away")


def is_played(run: Run) -> bool:
    """Whether a process is at it, which has the log locked (see `play`)."""
    try:
        with open(run.log, "r+b") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def command(run: Run) -> list[str]:
    """The script with its flags, or told to go on with what is there."""
    start = [sys.executable, os.path.relpath(ROOT / run.script)]
    if (run.folder / "checkpoint.pt").exists():
        return [*start, "--resume", str(run.folder)]
    flags = {"env_id": run.task, "seed": run.seed, "threads": run.threads} | run.arguments | {"run_dir": run.folder}
    for name, value in flags.items():
        flag = name.replace("_", "-")
        start += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return start


# ==================================================================================================
# Results
# ==================================================================================================
def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def hardware(gpu: bool) -> dict[str, Any]:
    """Of this machine; `gpu` says whether the run could use one."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0] if gpu else None
    except (OSError, subprocess.CalledProcessError, IndexError):
        name = None  # no such GPU
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "gpu": name}


def write_result(path: Path, games: bytes, record: dict[str, Any]) -> None:
    """`games`: the content of an episodes.csv, packed so that the same games give the same bytes. Then the .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress(games, mtime=0)
    for target, data in ((path.with_suffix(".csv.gz"), packed), (path, (json.dumps(record, indent=2) + "\n").encode())):
        temporary = target.with_name(f".{target.name}.{platform.node()}-{os.getpid()}")
        temporary.write_bytes(data)
        os.replace(temporary, target)  # whoever finds the file finds it whole


def export(folder: Path, path: Path) -> str:
    """A finished run's folder as `path` and the .csv.gz beside it. Returns its score, to be printed."""
    record = json.loads((folder / "args.json").read_text())
    record["arguments"]["run_dir"] = ""  # of no use elsewhere
    gpu = record["arguments"]["device"] != "cpu" and not record["versions"]["torch"].endswith("+cpu")
    record |= {"hardware": hardware(gpu), "trained_steps": saved_step(folder), "evaluation": None}
    if (folder / "evaluation.json").exists():
        record["evaluation"] = json.loads((folder / "evaluation.json").read_text())
    write_result(path, (folder / "episodes.csv").read_bytes(), record)
    evaluation = record["evaluation"]
    return f"evaluation {evaluation['mean']:.1f} ± {evaluation['std']:.1f}" if evaluation else "not evaluated"


def collect(folders: tuple[Path, ...], runs: list[Run]) -> None:
    """Export runs made by hand. Nothing is overwritten."""
    for folder in folders:
        try:
            arguments = json.loads((folder / "args.json").read_text())["arguments"]
            task, seed, games = arguments["env_id"], arguments["seed"], arguments["eval_episodes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{folder} is not the folder of a run: args.json: {error}")
        wrong = {
            run.index: difference(run, folder / "args.json") for run in runs if (run.task, run.seed) == (task, seed)
        }
        fitting = [index for index, problem in wrong.items() if not problem]
        if not fitting:
            fail(
                f"{folder} is no run of this matrix: {next(iter(wrong.values()), f'it has not {task} with seed {seed}')}"
            )
        run = runs[fitting[0]]
        if not is_finished(folder, games):
            fail(f"{folder} has not ended; go on with it first: python {run.script} --resume {folder}")
        if run.result.exists():
            fail(f"{run.result} is there already; {folder} would replace it")
        print(f"{run.result}: {export(folder, run.result)}")


# ==================================================================================================
# Playing
# ==================================================================================================
def train(run: Run, log: typing.BinaryIO) -> int:
    """The exit code of one sitting of the script. On KeyboardInterrupt it is told to save, and waited for."""
    if run.folder.exists() and not (run.folder / "checkpoint.pt").exists():  # killed before it had learnt anything
        run.folder.rename(run.folder.with_name(f"{run.folder.name}__{time.time_ns()}"))
    libc = ctypes.CDLL(None) if platform.system() == "Linux" else None
    process = subprocess.Popen(
        command(run),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=os.environ if run.gpus else os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,  # a terminal's Ctrl-C reaches the script through this process alone, once
        # If this process is killed, so is the script: nobody trains on unseen. 1 is PR_SET_PDEATHSIG.
        preexec_fn=(lambda: libc.prctl(1, signal.SIGKILL)) if libc else None,
    )
    try:
        while process.poll() is None:  # Ray's interruption does not end a wait
            time.sleep(0.2)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    return process.returncode


def last_line(path: Path) -> str:
    lines = path.read_bytes()[-10_000:].decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def play(run: Run, folder: str) -> tuple[bool, str]:
    """Play one run to its end on this machine, from the working directory `folder`, with a second try after a failure.

    Returns whether all is well, and what to say of it. Who plays has the run's log locked, its script with it.
    """
    os.chdir(folder)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    problem = ""
    with open(run.log, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True, "another process plays it, left alone"
        for _ in range(2):
            try:
                state = find_state(run)  # anew: another process may have played it meanwhile
                if state == "done":
                    return True, "done by another process"
                code = 0 if state == "finished, not exported" else train(run, log)
                if code == 0 and is_finished(run.folder, run.values["eval_episodes"]):
                    return True, f"done, {export(run.folder, run.result)}"
                problem = f"exit code {code}: {last_line(run.log)}" if code else "it was stopped from outside"
            except (OSError, ValueError, KeyError, SystemExit) as error:
                problem = str(error).removeprefix("error: ")
    return False, f"{problem}; {run.log}"


def play_on_ray(runs: list[Run], address: str | None, tell: Callable[[Run, bool, str], None]) -> None:
    """As many at a time as there are resources for; `tell` is called as each ends."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read as Ray is imported
    try:
        import ray
    except ImportError:
        fail("Ray is not installed: pip install -r requirements-dev.txt; or play one run with --only")
    options = {"address": address, "include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if address is None:
        options |= {"address": "local", "object_store_memory": 10**8}  # hardly anything is passed around
    host, _, port = (address or "").rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would try again for ever
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**options)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"--address {address}: {str(error).splitlines()[0]}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own
    need = {"CPU": runs[0].threads, "GPU": runs[0].gpus}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(machine.get(key, 0) >= amount for key, amount in need.items()) for machine in machines):
        ray.shutdown()
        fail(f"a run needs {need['CPU']} CPUs and {need['GPU']:g} GPUs, which no machine has")
    # max_retries: where a machine is lost, the run goes on from its checkpoint on another one.
    player = ray.remote(play).options(num_cpus=need["CPU"], num_gpus=need["GPU"], max_retries=1)
    pending = {player.remote(run, os.getcwd()): run for run in runs}
    try:
        while pending:
            (ended,), _ = ray.wait(list(pending), num_returns=1)
            try:
                tell(pending[ended], *ray.get(ended))
            except ray.exceptions.RayError as error:  # its machine or its watching process is gone
                tell(pending[ended], False, str(error).strip().splitlines()[-1])
            del pending[ended]
    except KeyboardInterrupt:
        print("stopping: every run saves a checkpoint; repeat to exit at once", flush=True)
        for task in pending:
            ray.cancel(task)
        ray.wait(list(pending), num_returns=len(pending))
        raise
    finally:
        ray.shutdown()


# ==================================================================================================
# Main
# ==================================================================================================
def print_table(runs: list[Run]) -> None:
    rows = [("index", "task", "label", "seed", "state", "command")]
    for run in runs:
        state = "being played" if is_played(run) else find_state(run)
        words = shlex.join(command(run)) if state.startswith(("to do", "interrupted")) else ""
        rows.append((str(run.index), run.task, run.label, str(run.seed), state, words))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths[:-1])) + "  " + row[-1])


def main(args: Args) -> None:
    """Raises SystemExit with 1 if a run failed or the input is wrong, with 130 if it was interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both raise KeyboardInterrupt, also where a shell ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    runs = plan_runs(args.matrix, args.runs, args.results)
    if args.only is not None:
        if not 0 <= args.only < len(runs):
            fail(f"--only {args.only}: {args.matrix} has runs 0 to {len(runs) - 1}")
        runs = [runs[args.only]]
    if args.collect:
        return collect(args.collect, runs)
    if args.dry_run:
        return print_table(runs)
    for flag, folder in (("--runs", args.runs), ("--results", args.results)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".write-test").touch()
            (folder / ".write-test").unlink()
        except OSError as error:
            fail(f"{flag} {folder} cannot be written: {error.strerror}")
    states = {run.index: find_state(run) for run in runs}
    if wrong := [state for state in states.values() if state.startswith("differs")]:
        fail(f"{wrong[0].removeprefix('differs: ')}; move it away, or give the matrix another name")
    to_play = [run for run in runs if states[run.index] != "done"]
    print(f"{args.matrix}: {len(runs)} runs, {len(runs) - len(to_play)} done, {len(to_play)} to play", flush=True)
    failures = []

    def tell(run: Run, well: bool, text: str) -> None:
        print(f"{run.name}: {text}", flush=True)
        failures.extend([] if well else [f"failed: {run.name}: {text}"])

    try:
        if args.only is not None:
            for run in to_play:
                tell(run, *play(run, os.getcwd()))
        elif to_play:
            print(f"what they print: {args.runs / args.matrix.stem}/*.log", flush=True)
            play_on_ray(to_play, args.address, tell)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        raise SystemExit(130) from None
    if failures:
        print("\n".join(failures), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
