"""Play an experiment matrix: every script with its flags, on every task, from every seed.

    python benchmark/run.py benchmark/matrices/mujoco.toml --dry-run           # what is there, what is to do
    python benchmark/run.py benchmark/matrices/mujoco.toml                     # on this machine, all cores
    python benchmark/run.py benchmark/matrices/mujoco.toml --address HOST:6379 # on a Ray cluster
    sbatch --array=0-39 benchmark/slurm.sh benchmark/matrices/mujoco.toml      # one Slurm job per run, without Ray

A matrix is a TOML file (benchmark/matrices/ has examples): `question`, `tasks`, `seeds`, `cpus` and `gpus` of one run
(cpus is also its --threads; 0 gpus hides them), `[flags]` of every run, and `[arms.<label>]` with `title`, `script` and
`flags` of its own. A script is one of the four or a fork of one, a copy beside it. The first arm is what the others are
compared with. An arm with `beginning_of`, the name of another matrix, is not played here: its results are the first
steps of that matrix's longer runs of the same label, as they are what a shorter run would have been, but for games
restarted at other checkpoints (and so its step size may not be annealed). `[peers]`, label = title, are programs of
others that have results in the matrix's folder, made by benchmark/cleanrl.py. For plot.py are `saturated`, of the tasks
those that most seeds of every arm solve, and `[contrasts]`, title = "arm - arm + ...", what to test beside the
comparisons (an arm of another matrix: matrix/arm). All but those is checked before anything starts.

Each run is the ordinary script as a process of its own, in `<runs>/<matrix>/<task>__<arm>__<seed>`, its output in a
.log beside that. Once it is finished it is exported as benchmark/collect.py says. Call the same command again as often
as you like: what is finished is skipped (by its script's name and flags: after a change of a fork's text give the copy
or the arm another name), what was interrupted goes on from its last checkpoint and ends as if it had been left alone, a
folder without a readable checkpoint after step 0 is set aside under another name. A run that fails is tried once more,
then listed; the exit code is then 1. Ctrl-C and SIGTERM save all runs, at a checkpoint more than they would have had
(the games restart there), and exit with 130; a second one saves none.

On a cluster, and under Slurm, this folder, `runs` and `results` must lie on a file system that all machines share.
"""

import ctypes
import difflib
import fcntl
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro
from collect import LABEL, export, fail, file_name, hardware, result_path, write

PARTS = ("Args", "check_args", "env_protocol", "checkpoint_paths", "load_checkpoint", "MAY_CHANGE", "main")
OWN_FLAGS = ("env_id", "seed", "run_dir", "resume", "evaluate", "threads")  # which this program sets (threads: cpus)
TOP_KEYS = {"question": str, "tasks": list, "seeds": list, "cpus": int, "gpus": float, "flags": dict, "arms": dict}
TOP_KEYS |= {"saturated": list, "peers": dict, "contrasts": dict}  # which plot.py reads
ARM_KEYS = {"title": str, "script": str, "flags": dict, "beginning_of": str}
OPTIONAL = ("cpus", "gpus", "flags", "beginning_of", "saturated", "peers", "contrasts")


@dataclass
class Args:
    matrix: Annotated[Path, tyro.conf.Positional]
    """the matrix, a TOML file"""
    address: str | None = None
    """of a Ray cluster, HOST:PORT, or "auto" on one of its machines (default: this machine alone)"""
    runs: Path = Path("runs")
    """where the run folders are made"""
    results: Path = Path("benchmark/results")
    """where finished runs are exported to"""
    only: int | None = None
    """play the run of this index alone, in this process, without Ray"""
    dry_run: bool = False
    """print the table of runs, their states and their commands, and do nothing"""


@dataclass
class Run:
    index: int
    task: str
    arm: str
    seed: int
    script: str
    arguments: dict[str, Any]  # of the script, by field name: all that the matrix decides
    settings: dict[str, Any]  # all that decides what is learnt, the script's defaults as well
    threads: int
    gpus: float
    folder: Path
    result: Path
    beginning_of: str | None  # the matrix that plays it, and goes on

    @property
    def name(self) -> str:
        return f"[{self.index}] {self.task} {self.arm} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


# ==================================================================================================
# The matrix
# ==================================================================================================
def load_script(name: str) -> types.ModuleType:
    return importlib.import_module(Path(name).stem)


def check_script(name: str, where: str) -> None:
    """One of the four, or a fork of one beside them, which has to have the same PARTS."""
    if not re.fullmatch(r"[a-z_]\w*\.py", name, re.ASCII | re.IGNORECASE):
        fail(f"{where}: script {name!r} is no name for one: letters, digits and _, then .py")
    if not (ROOT / name).is_file():
        fail(f"{where}: there is no script {name!r} in {ROOT}")
    try:
        missing = [part for part in PARTS if not hasattr(load_script(name), part)]
    except Exception as error:  # whatever is wrong with a fork
        fail(f"{where}: script {name!r} cannot be imported: {type(error).__name__}: {error}")
    if missing:
        fail(f"{where}: script {name!r} has no {missing[0]}; it should be one of the four or a fork of one")


def fits(value: Any, kind: Any) -> bool:
    """Whether a TOML value can stand for a field of this type. None, which TOML has not, is written "None"."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(value == "None" if member is types.NoneType else fits(value, member) for member in kind.__args__)
    return type(value) in ((int, float) if kind is float else (kind,))


def says(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def check_keys(table: dict, known: dict[str, type], where: str) -> None:
    for key in table:
        if key not in known:
            fail(f"{where}: {key} is not a key; there are {', '.join(known)}")
    for key, kind in known.items():
        if key not in table and key not in OPTIONAL:
            fail(f"{where}: {key} is missing")
        if key in table and not fits(table[key], kind):
            fail(f"{where}: {key} = {table[key]!r} is not of type {kind.__name__}")


def script_arguments(flags: dict[str, Any], script: str, where: str) -> dict[str, Any]:
    """Flags of the command line as fields of the script's Args. Refuses what the script does not have."""
    kinds = typing.get_type_hints(load_script(script).Args)
    arguments = {}
    for flag, value in flags.items():
        name = flag.replace("-", "_")
        if name in OWN_FLAGS:
            fail(f"{where}: --{flag} is not for the matrix to set")
        if name not in kinds or "_" in flag:
            near = difflib.get_close_matches(name, kinds, n=1)
            mend = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            fail(f"{where}: {script} has no flag --{flag}{mend}")
        if not fits(value, kinds[name]):
            fail(f"{where}: {flag} = {value!r}, but --{flag} takes {says(kinds[name])}")
        arguments[name] = None if value == "None" and kinds[name] is not str else value
    return arguments


def load_matrix(path: Path, runs: Path, results: Path) -> list[Run]:
    """All runs of a matrix, those of the first seed first. Ends the program with one line if it is not sound."""
    try:
        matrix = tomllib.loads(path.read_text())
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
    except ValueError as error:
        fail(f"{path} is not TOML: {error}")
    if not re.fullmatch(LABEL, path.stem):
        fail(f"{path}: the name of a matrix consists of a-z, 0-9 and -")
    check_keys(matrix, TOP_KEYS, str(path))
    tasks, seeds, cpus, gpus = matrix["tasks"], matrix["seeds"], matrix.get("cpus", 1), matrix.get("gpus", 0.0)
    for key, kind in (("tasks", str), ("seeds", int)):
        if not matrix[key] or not all(fits(value, kind) for value in matrix[key]):
            fail(f"{path}: {key} = {matrix[key]} is not a list of {kind.__name__}, at least one")
        if double := [value for value in matrix[key] if matrix[key].count(value) > 1]:
            fail(f"{path}: {key} has {double[0]} twice")
    if strange := [task for task in matrix.get("saturated", []) if task not in tasks]:
        fail(f"{path}: saturated has {strange[0]!r}, which is not one of the tasks")
    for label, title in matrix.get("peers", {}).items():
        if not re.fullmatch(LABEL, label) or not isinstance(title, str) or label in matrix["arms"]:
            fail(f"{path}: peers has {label} = {title!r}, but takes a label (a-z, 0-9, -) of its own and a title")
    if cpus < 1:
        fail(f"{path}: cpus must be at least 1, not {cpus}")
    if not 0 <= gpus <= 1:
        fail(f"{path}: gpus must lie in [0, 1], not {gpus}: a run uses one at most")
    if not matrix["arms"]:
        fail(f"{path}: arms is empty")
    others = {other.stem for other in path.parent.glob("*.toml")} - {path.stem}
    arms = {}
    for label, arm in matrix["arms"].items():
        where = f"{path}: arms.{label}"
        if not re.fullmatch(LABEL, label):
            fail(f"{where}: a label consists of a-z, 0-9 and -")
        if not isinstance(arm, dict):
            fail(f"{where} is not a table")
        check_keys(arm, ARM_KEYS, where)
        if "beginning_of" in arm and arm["beginning_of"] not in others:
            fail(f"{where}: beginning_of = {arm['beginning_of']!r} is not the name of another matrix in {path.parent}")
        check_script(arm["script"], where)
        arms[label] = script_arguments(matrix.get("flags", {}) | arm.get("flags", {}), arm["script"], where)
        if arms[label].get("device", "auto") not in ("auto", "cpu") and not gpus:
            fail(f"{where}: device = {arms[label]['device']!r}, but gpus = 0")
    known, plan = set(), []  # known: (script, task) whose protocol was looked up
    for index, (seed, task, label) in enumerate(itertools.product(seeds, tasks, arms)):
        name = matrix["arms"][label]["script"]
        script, arguments = load_script(name), {"env_id": task, "seed": seed} | arms[label]
        try:  # the machine that plays may have a GPU, or a compiler, where this one has none
            elsewhere = {"device": "cpu"} | ({"compile": False} if "compile" in arguments else {})
            checked = script.check_args(script.Args(**arguments | elsewhere))
            if (name, task) not in known:
                script.env_protocol(checked)
                known.add((name, task))
        except SystemExit as error:
            fail(f"{path}: arms.{label}: {str(error).removeprefix('error: ')}")
        # Some flags decide others (--paper-literal): these are what args.json will hold.
        arguments |= {name: getattr(checked, name) for name in arguments.keys() - elsewhere.keys()}
        settings = vars(checked).keys() - script.MAY_CHANGE - {"run_dir", "checkpoint_interval"}
        settings = {name: getattr(checked, name) for name in settings}
        rollout_size = checked.num_envs * checked.num_steps
        origin = matrix["arms"][label].get("beginning_of")
        if origin and checked.anneal_lr:
            fail(f"{path}: arms.{label}: beginning_of, but with an annealed step size a longer run begins differently")
        if origin and checked.total_timesteps % rollout_size:
            fail(f"{path}: arms.{label}: beginning_of, but total-timesteps is no multiple of a rollout, {rollout_size}")
        place = runs / path.stem / f"{file_name(task)}__{label}__{seed}"
        result = result_path(results, origin or path.stem, task, label, seed)
        plan.append(Run(index, task, label, seed, name, arguments, settings, cpus, float(gpus), place, result, origin))
    return plan


# ==================================================================================================
# What is there of a run
# ==================================================================================================
def read_record(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
        return {"trained_steps": 0} | record | {"script": record["script"], "arguments": dict(record["arguments"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} is damaged: {type(error).__name__}: {error}; move it away")


def difference(run: Run, path: Path) -> str:
    """How the arguments or the steps that made `path` differ from the matrix's: one sentence, or ""."""
    record = read_record(path)
    if record["script"] != run.script:
        return f"{path} is of {record['script']}, not of {run.script}"
    if missing := run.arguments.keys() - record["arguments"].keys():
        return f"{path} was made before --{min(missing).replace('_', '-')} existed"
    ours, theirs = run.settings | run.arguments, record["arguments"]
    if run.beginning_of:
        if theirs["total_timesteps"] < ours["total_timesteps"]:
            return f"{path} has {theirs['total_timesteps']} agent steps, fewer than {ours['total_timesteps']}"
        ours = {name: value for name, value in ours.items() if name in run.settings}  # what came after is its own
    for name, value in ours.items():  # a default may have changed since
        if theirs.get(name, value) != value:
            flag = name.replace("_", "-")
            return f"{path} was made with --{flag} {theirs[name]}, not {value}"
    rollout_size = run.settings["num_envs"] * run.settings["num_steps"]
    total = run.arguments.get("total_timesteps", load_script(run.script).Args.total_timesteps)
    if path == run.result and record["trained_steps"] < total // rollout_size * rollout_size:
        return f"{path} has {record['trained_steps']} agent steps only"  # exported before the run had ended
    return ""


def is_played(run: Run) -> bool:
    """Whether a process is at it: that has the log locked (see `sit`)."""
    try:
        with open(run.log, "r+b") as log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def last_step(run: Run) -> int | None:
    """Of the newest checkpoint that can be read. None if there is none."""
    script = load_script(run.script)
    if not (run.folder / "args.json").exists() or not script.checkpoint_paths(run.folder):
        return None
    try:
        return script.load_checkpoint(run.folder, {})["progress"]["global_step"]
    except SystemExit:
        return None


def is_finished(run: Run) -> bool:
    games = run.arguments.get("eval_episodes", load_script(run.script).Args.eval_episodes)
    return (run.folder / "model.pt").exists() and (games == 0 or (run.folder / "evaluation.json").exists())


def find_state(run: Run) -> tuple[str, int | None]:
    """(state, step): what of a run is there. Changes nothing."""
    if run.result.exists() and run.result.with_suffix(".csv.gz").exists():
        wrong = difference(run, run.result)
        return (f"differs: {wrong}", None) if wrong else ("done", None)
    if run.beginning_of:
        return f"left to {run.beginning_of}", None
    if is_played(run):
        return "being played", None
    if not run.folder.exists():
        return "to do", None
    step = last_step(run)
    if not step:  # at step 0 nothing is lost, and a script that failed there may have been mended since
        return "to do, what is there set aside", None
    if wrong := difference(run, run.folder / "args.json"):
        return f"differs: {wrong}", None
    return ("played, to export", None) if is_finished(run) else (f"interrupted at {step}", step)


def command(run: Run, step: int | None) -> list[str]:
    """The script with its flags; with a step to go on from, the run's own arguments are taken."""
    start = [sys.executable, os.path.relpath(ROOT / run.script)]
    if step is not None:
        return [*start, "--resume", str(run.folder)]
    flags = {"threads": run.threads} | run.arguments | {"run_dir": run.folder}
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return start + words


def set_aside(folder: Path) -> None:
    names = (folder.with_name(f"{folder.name}__aside{number}") for number in itertools.count(1))
    folder.rename(next(name for name in names if not name.exists()))


# ==================================================================================================
# Playing
# ==================================================================================================
def sit(words: list[str], folder: Path, log_path: Path, cwd: str, gpus: float) -> Iterator[str | int]:
    """One sitting of a run: yields the machine's name as it starts and the exit code as it ends.

    If another process plays this run, or has begun or ended it since the command was made, yields nothing. On
    KeyboardInterrupt the script is told to save, and waited for.
    """
    os.chdir(cwd)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A script whose watcher is gone is killed: it goes on from its last checkpoint, with no barrier that others lack.
    libc = ctypes.CDLL(None) if platform.system() == "Linux" else None
    die_with_parent = (lambda: libc.prctl(1, signal.SIGKILL)) if libc else None  # 1 is PR_SET_PDEATHSIG
    environment = os.environ if gpus else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with open(log_path, "ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # inherited: held as long as the script lives
        except BlockingIOError:
            return
        # Since the command was made, which may be hours ago, another process may have begun or ended this run.
        resumes = "--resume" in words
        if folder.exists() != resumes or (folder / "evaluation.json").exists():
            return
        yield platform.node()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C reaches the script through this process alone, once
            preexec_fn=die_with_parent,
        )
        try:
            while process.poll() is None:  # Ray's interruption does not end a wait
                time.sleep(0.2)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            if folder.exists():
                write(folder / "hardware.json", (json.dumps(hardware(gpus > 0)) + "\n").encode())
        yield process.returncode


def last_line(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 10_000))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def finish(run: Run) -> None:
    record, seconds = export(run.folder, run.result)
    result = record["evaluation"]
    score = f"{result['mean']:.1f} ± {result['std']:.1f}" if result else "not asked for"
    print(f"{run.name}: done in {seconds:.0f} s, evaluation {score}", flush=True)


def prepare(run: Run, report: "Report") -> list[str] | None:
    """The command of the next sitting. None if there is none left: whatever is finished is exported here."""
    state, step = find_state(run)
    if state == "played, to export":
        report.finished(run)
    if state == "done":  # by another process, if it failed here
        report.failures.pop(run.index, None)
    if state in ("done", "played, to export"):
        return None
    if state.startswith("to do,"):
        set_aside(run.folder)
    return command(run, step)


class Report:
    """Says what happens, and which runs are to be tried again."""

    def __init__(self):
        self.failures: dict[int, str] = {}  # by index

    def started(self, run: Run, words: list[str], machine: str) -> None:
        how = "goes on" if "--resume" in words else "starts"
        print(f"{run.name}: {how} on {machine}", flush=True)

    def finished(self, run: Run) -> None:
        """Export it. What goes wrong there is listed, and stops no other run."""
        self.failures.pop(run.index, None)
        try:
            finish(run)
        except (OSError, ValueError, KeyError, SystemExit) as error:
            self.failures[run.index] = f"played, but not exported: {str(error).removeprefix('error: ')}"
            print(f"{run.name}: {self.failures[run.index]}", flush=True)

    def ended(self, run: Run, problem: str) -> bool:
        """After a sitting. `problem`: why there is no exit code of 0, or "". Returns whether to try again."""
        if not problem and is_finished(run):
            self.finished(run)
            return False
        problem = problem or "it was stopped from outside"
        again = run.index not in self.failures
        self.failures[run.index] = problem
        print(f"{run.name}: failed, {problem}{'; trying once more' if again else ''}", flush=True)
        return again


def outcome(run: Run, events: list[str | int]) -> str:
    """Why a sitting that yielded these events came to nothing, or ""."""
    if not events:
        return f"another process plays it, or has begun or ended it meanwhile ({run.log})"
    code = events[-1]
    return "" if code == 0 else f"exit code {code}: {last_line(run.log)}"


def play_here(runs: list[Run], report: Report) -> None:
    """One after the other, in this process."""
    for run in runs:
        again = True
        while again and (words := prepare(run, report)):
            events = []
            for event in sit(words, run.folder, run.log, os.getcwd(), run.gpus):
                if not events:
                    report.started(run, words, event)
                events.append(event)
            again = report.ended(run, outcome(run, events))


def play_on_ray(runs: list[Run], report: Report, address: str | None) -> None:
    """As many at a time as there are resources for."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read as Ray is imported
    try:
        import ray
    except ImportError:
        fail("Ray is not installed: pip install -r requirements-dev.txt; or play one run with --only")
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    if address is None:
        options |= {"address": "local", "object_store_memory": 10**8}  # hardly anything is passed around
    host, _, port = (address or "").rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would try again for ever
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**{"address": address} | options)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"--address {address}: {str(error).splitlines()[0]}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own
    need = {"CPU": runs[0].threads, "GPU": runs[0].gpus}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(machine.get(key, 0) >= amount for key, amount in need.items()) for machine in machines):
        ray.shutdown()
        fail(f"a run needs {need['CPU']} CPUs and {need['GPU']:g} GPUs, which no machine has")
    player = ray.remote(sit).options(num_cpus=need["CPU"], num_gpus=need["GPU"], max_retries=0, num_returns="streaming")
    sittings = {}  # generator of events -> (run, command, events so far)

    def submit(run: Run) -> None:
        if words := prepare(run, report):
            sittings[player.remote(words, run.folder, run.log, os.getcwd(), run.gpus)] = run, words, []

    try:
        for run in runs:
            submit(run)
        while sittings:
            (events,), _ = ray.wait(list(sittings), num_returns=1)
            run, words, seen = sittings[events]
            try:
                seen.append(ray.get(next(events)))
                if len(seen) == 1:
                    report.started(run, words, seen[0])
                continue
            except StopIteration:
                problem = outcome(run, seen)
            except ray.exceptions.RayError as error:  # its machine or its watching process is gone
                problem = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            del sittings[events]
            if report.ended(run, problem):
                submit(run)
    except KeyboardInterrupt:
        print("stopping: every run saves a checkpoint; repeat to exit at once", flush=True)
        for events in sittings:
            ray.cancel(events)
        for events in sittings:
            try:
                for event in events:
                    ray.get(event)
            except ray.exceptions.RayError:
                pass  # it was cancelled: its script has saved and is gone
        raise
    finally:
        ray.shutdown()


# ==================================================================================================
# Main
# ==================================================================================================
def print_table(runs: list[Run]) -> None:
    rows = [("index", "task", "arm", "seed", "state", "command")]
    for run in runs:
        state, step = find_state(run)
        over = state in ("done", "being played", "played, to export") or state.startswith(("differs", "left to"))
        words = "" if over else shlex.join(command(run, step))
        rows.append((str(run.index), run.task, run.arm, str(run.seed), state, words))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths[:-1])) + "  " + row[-1])


def main(args: Args) -> None:
    """Raises SystemExit with 1 if a run failed or the input is wrong, with 130 if it was interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both raise KeyboardInterrupt, also where a shell ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    runs = load_matrix(args.matrix, args.runs, args.results)
    if args.only is not None:
        if not 0 <= args.only < len(runs):
            fail(f"--only {args.only}: {args.matrix} has runs 0 to {len(runs) - 1}")
        runs = [runs[args.only]]
    if args.dry_run:
        print_table(runs)
        return
    for flag, folder in (("--runs", args.runs), ("--results", args.results)):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            fail(f"{flag} {folder} cannot be written: {there} is {'not writable' if there.is_dir() else 'a file'}")
    to_play = []
    for run in runs:
        state, _ = find_state(run)
        if state.startswith("differs"):
            fail(f"{state.removeprefix('differs: ')}; move it away, or give the matrix another name")
        if state == "being played":
            print(f"{run.name}: another process plays it, left alone")
        elif state.startswith("left to"):
            print(f"{run.name}: {state}, which has not played it yet")
        elif state != "done":
            to_play.append(run)
    done = len(runs) - len(to_play)
    print(f"{args.matrix}: {len(runs)} runs, {done} done or left alone, {len(to_play)} to play", flush=True)
    report = Report()
    try:
        if args.only is not None:
            play_here(to_play, report)
        elif to_play:
            play_on_ray(to_play, report, args.address)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        raise SystemExit(130) from None
    for run in runs:
        if run.index in report.failures:
            print(f"failed: {run.name}: {report.failures[run.index]}; {run.log}", file=sys.stderr)
    if report.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
