"""Play an experiment matrix: every script, on every task, from every seed.

    python benchmark/run.py MATRIX --dry-run            # all runs, and commands
    python benchmark/run.py MATRIX                      # here, on all cores
    python benchmark/run.py MATRIX --address HOST:6379  # on a Ray cluster
    sbatch --array=0-39 benchmark/slurm.sh MATRIX       # one Slurm job per run
    python benchmark/run.py MATRIX --collect RUN_DIR    # add runs made by hand

A matrix is a TOML file (benchmark/matrices/ has examples): `question`, `tasks`, `seeds`, `cpus` and `gpus` of one run
(cpus is also its --threads; with 0 gpus it sees none), `[flags]` of every run, and `[arms.<label>]` with `title`,
`script` (one of the four or a fork beside them) and `flags` of its own.

Each run is the ordinary script in a process of its own, in `<runs>/<matrix>/<task>__<label>__<seed>`; what it prints is
in a .log beside that. A finished run is exported to `<results>/<matrix>/<task>/`: its games as `<label>_seed<n>.csv.gz`
(the run's episodes.csv), its arguments, versions, hardware and evaluation as `<label>_seed<n>.json`. Both folders are
yours; what is published lies in benchmark/results.

Call the same command again as often as you like: what is finished is skipped, what was interrupted goes on and ends as
if it had been left alone, what failed is tried once more, then listed (exit code 1). What was made with other flags or
another length than the matrix says is refused by name. Ctrl-C and SIGTERM let every run save (exit code 130). On a
cluster, and under Slurm, this folder, `runs` and `results` must lie on a file system that all machines share.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import gzip
import importlib
import io
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
import tempfile
import time
import tomllib
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tyro

LABEL = "[a-z0-9-]+"  # of an arm, and the name of a matrix
OWN_FLAGS = {"env_id", "seed", "run_dir", "resume", "evaluate", "threads"}  # which this program sets (threads: cpus)
PARTS = ("Args", "MAY_CHANGE", "env_protocol", "main")  # of a script
TOP_KEYS = {"question": str, "tasks": list, "seeds": list, "cpus": int, "gpus": float, "flags": dict, "arms": dict}
TOP_KEYS |= {"peers": dict}  # label = title: programs of others, whose results plot.py sets beside
ARM_KEYS = {"title": str, "script": str, "flags": dict}
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
    gpus: float
    task: str
    label: str
    seed: int
    script: str
    flags: dict[str, Any]  # of the script's command line
    values: dict[str, Any]  # all its arguments by field name, its defaults as well
    compared: set[str]  # of these, those that decide what is learnt
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


def check_keys(table: Any, known: dict[str, type], where: str) -> None:
    for key, value in table.items():
        if key not in known:
            fail(f"{where}: {key} is not a key; there are {', '.join(known)}")
        if type(value) not in ((int, float) if known[key] is float else (known[key],)):
            fail(f"{where}: {key} = {value!r} is not of type {known[key].__name__}")
    if missing := [key for key in known if key in REQUIRED and key not in table]:
        fail(f"{where}: {missing[0]} is missing")


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
    matrix = {"cpus": 1, "gpus": 0.0, "flags": {}, "peers": {}} | matrix
    for key, kind in (("tasks", str), ("seeds", int)):
        values = matrix[key]
        if not values or {*map(type, values)} != {kind} or len({*values}) < len(values):
            fail(f"{path}: {key} = {values} is not a list of {kind.__name__}, at least one, each once")
    if matrix["cpus"] < 1 or not 0 <= matrix["gpus"] <= 1:
        fail(f"{path}: a run takes at least one of cpus, and gpus in [0, 1], not {matrix['cpus']}, {matrix['gpus']:g}")
    for label, arm in matrix["arms"].items():
        if not re.fullmatch(LABEL, label):
            fail(f"{path}: arms.{label}: a label consists of a-z, 0-9 and -")
        check_keys(arm if type(arm) is dict else {}, ARM_KEYS, f"{path}: arms.{label}")
    return matrix


def load_script(name: str, where: str) -> types.ModuleType:
    """One of the four, or a fork beside them, which has to have the same PARTS."""
    if not (ROOT / name).is_file():
        fail(f"{where}: there is no script {name!r} in {ROOT}")
    sys.path.append(str((ROOT / name).parent))
    try:
        script = importlib.import_module(Path(name).stem)
    except Exception as error:  # whatever is wrong with a fork
        fail(f"{where}: script {name!r} cannot be imported: {type(error).__name__}: {error}")
    if any(not hasattr(script, part) for part in PARTS):
        fail(f"{where}: script {name!r} is none of the four nor a fork of one: it has not all of {', '.join(PARTS)}")
    return script


def flag_words(flags: dict[str, Any]) -> list[str]:
    """As a command line has them."""
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def parse_words(words: list[str], script: types.ModuleType, where: str) -> Any:
    """The script's Args, read as the script will read them. What it would refuse is refused here, in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(script.Args, args=words)
    except SystemExit:
        _, *lines = (line.strip(" │╭╮╰╯─") for line in said.getvalue().splitlines())  # without box and title
        text = " ".join(line for line in lines if line.strip("-")).partition(" For full helptext")[0]
        fail(f"{where}: {script.__name__}.py: {text}")


def file_name(task: str) -> str:
    """Of a task's folders: its id, without what a file system does not take."""
    return task.replace("/", "-").replace(":", "-")


def result_path(results: Path, matrix: str, task: str, label: str, seed: int) -> Path:
    """The .json of a run; its .csv.gz lies beside it."""
    return results / matrix / file_name(task) / f"{label}_seed{seed}.json"


def plan_runs(path: Path, runs: Path, results: Path) -> list[Run]:
    """All runs of a matrix, the first seed's first. Ends with one line if one of them could not be played."""
    matrix = load_matrix(path)
    arms, plan = {}, []
    for label, arm in matrix["arms"].items():
        where, flags = f"{path}: arms.{label}", matrix["flags"] | arm.get("flags", {})
        script = load_script(arm["script"], where)
        if own := OWN_FLAGS & {flag.replace("-", "_") for flag in flags}:
            fail(f"{where}: --{min(own).replace('_', '-')} is not for the matrix to set")
        arms[label] = script, flags, parse_words(flag_words(flags), script, where)
        if unknown := {flag.replace("-", "_") for flag in flags} - vars(arms[label][2]).keys():
            fail(f"{where}: {min(unknown)} is not a flag; a switch is turned off by its own name = false")
        if flags.get("device", "auto") not in ("auto", "cpu") and not matrix["gpus"]:
            fail(f"{where}: device = {flags['device']!r}, but gpus = 0")
    for seed, task, label in itertools.product(matrix["seeds"], matrix["tasks"], arms):
        script, flags, parsed = arms[label]
        try:
            checked = dataclasses.replace(parsed, env_id=task, seed=seed, threads=matrix["cpus"])
            if seed == matrix["seeds"][0]:
                script.env_protocol(checked)  # ends with one line if there is no such task
        except (ValueError, SystemExit) as error:
            fail(f"{path}: arms.{label}: {str(error).removeprefix('error: ')}")
        compared = vars(checked).keys() - script.MAY_CHANGE - OWN_FLAGS - {"checkpoint_interval"}
        compared |= {"env_id", "seed", "total_timesteps"} | {flag.replace("-", "_") for flag in flags} - {"device"}
        folder = runs / path.stem / f"{file_name(task)}__{label}__{seed}"
        flags = {"env-id": task, "seed": seed, "threads": matrix["cpus"]} | flags | {"run-dir": folder}
        result = result_path(results, path.stem, task, label, seed)
        place = len(plan), matrix["gpus"], task, label, seed
        plan.append(Run(*place, matrix["arms"][label]["script"], flags, vars(checked), compared, folder, result))
    return plan


def difference(run: Run, path: Path) -> str:
    """How the run that wrote `path` differs from what the matrix says: one sentence, or ""."""
    try:
        record = json.loads(path.read_text())
        script, theirs = record["script"], dict(record["arguments"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path} is damaged: {type(error).__name__}: {error}; move it away")
    if script != Path(run.script).name:
        return f"{path} is of {script}, not of {run.script}"
    for name in sorted(run.compared):
        flag, value = name.replace("_", "-"), run.values[name]
        if theirs.get(name, "unknown" if flag in run.flags else value) != value:
            return f"{path} was made with --{flag} {theirs.get(name, 'unknown')}, not {value}"
    rollout = run.values["num_envs"] * run.values["num_steps"]
    if record.get("trained_steps", run.values["total_timesteps"]) < run.values["total_timesteps"] // rollout * rollout:
        return f"{path} has {record['trained_steps']} agent steps only"  # exported before it had ended
    return ""


def find_state(run: Run) -> str:
    """What of a run is there. Changes nothing."""
    if run.result.exists() and run.result.with_suffix(".csv.gz").exists():
        wrong = difference(run, run.result)
        return f"differs: {wrong}" if wrong else "done"
    if not (run.folder / "checkpoint.pt").exists():
        return "to do"
    if wrong := difference(run, run.folder / "args.json"):
        return f"differs: {wrong}"
    if is_finished(run):
        return "finished, not exported"
    return f"interrupted at step {saved_step(run.folder)}"


def is_finished(run: Run) -> bool:
    evaluated = (run.folder / "evaluation.json").exists() or not run.values["eval_episodes"]
    return evaluated and (run.folder / "model.pt").exists()


def saved_step(folder: Path) -> int:
    """Agent steps trained by the checkpoint."""
    import torch

    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception as error:  # torch has no one kind for them
        fail(f"{folder}/checkpoint.pt is damaged: {type(error).__name__}; move the folder away")


def lock_log(run: Run) -> BinaryIO | None:
    """The run's log, locked until both this process and a script started by it are done. None: another one plays it."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = open(run.log, "ab")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return log


def command(run: Run) -> list[str]:
    """The script with its flags, or told to go on with what is there."""
    goes_on = (run.folder / "checkpoint.pt").exists()
    words = ["--resume", str(run.folder)] if goes_on else flag_words(run.flags)
    return [sys.executable, os.path.relpath(ROOT / run.script), *words]


def cpu_model() -> str:
    known = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    found = re.search(r"model name\s*: (.*)", known)
    return found[1] if found else platform.processor() or "unknown CPU"


def hardware(gpu: bool) -> dict[str, Any]:
    """Of this machine; `gpu` says whether the run could use one."""
    query = "nvidia-smi --query-gpu=name --format=csv,noheader"
    names = subprocess.run(query, shell=True, capture_output=True, text=True).stdout if gpu else ""
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "gpu": names.partition("\n")[0] or None}


def write_result(path: Path, games: bytes, record: dict[str, Any]) -> None:
    """`games`: the content of an episodes.csv, packed so that the same games give the same bytes. Then the .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    for target, data in ((path.with_suffix(".csv.gz"), gzip.compress(games, mtime=0)), (path, text.encode())):
        temporary = target.with_name(f".{target.name}.{platform.node()}-{os.getpid()}")
        temporary.write_bytes(data)
        os.replace(temporary, target)  # whoever finds the file finds it whole


def export(folder: Path, path: Path) -> str:
    """A finished run's folder as `path` and the .csv.gz beside it. Returns its score, to be printed."""
    record = json.loads((folder / "args.json").read_text())
    record["arguments"]["run_dir"] = ""  # of no use elsewhere
    gpu = record["arguments"]["device"] != "cpu" and not record["versions"]["torch"].endswith("+cpu")
    file = folder / "evaluation.json"
    evaluation = json.loads(file.read_text()) if file.exists() else None
    record |= {"hardware": hardware(gpu), "trained_steps": saved_step(folder), "evaluation": evaluation}
    write_result(path, (folder / "episodes.csv").read_bytes(), record)
    return f"evaluation {evaluation['mean']:.1f} ± {evaluation['std']:.1f}" if evaluation else "not evaluated"


def collect(folders: tuple[Path, ...], runs: list[Run]) -> None:
    """Export runs made by hand. Nothing is overwritten."""
    for folder in folders:
        try:
            arguments = json.loads((folder / "args.json").read_text())["arguments"]
            which = arguments["env_id"], arguments["seed"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{folder} is not the folder of a run: args.json: {error}")
        candidates = [dataclasses.replace(run, folder=folder) for run in runs if (run.task, run.seed) == which]
        wrong = [difference(run, folder / "args.json") for run in candidates] or [f"it has no {which}"]
        if "" not in wrong:
            fail(f"{folder} is no run of this matrix: {'; '.join(wrong)}")
        run = candidates[wrong.index("")]
        if (state := find_state(run)) != "finished, not exported":
            fail(f"{folder} is {state}; {run.result}")
        print(f"{run.result}: {export(folder, run.result)}")


def train(run: Run, log: BinaryIO) -> int:
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


def play(run: Run, folder: str) -> tuple[bool, str]:
    """Play one run to its end on this machine, from the working directory `folder`, with a second try after a failure.

    Returns whether all is well, and what to say of it.
    """
    os.chdir(folder)
    log = lock_log(run)
    if not log:
        return True, "another process plays it, left alone"
    for _ in range(2):
        try:
            code = 0 if is_finished(run) else train(run, log)
            if is_finished(run):
                return True, f"done, {export(run.folder, run.result)}"
            *_, last_line = ["no output", *run.log.read_text(errors="replace").strip().splitlines()]
            problem = f"exit code {code}: {last_line}" if code else "it was stopped from outside"
        except (OSError, ValueError, KeyError, SystemExit) as error:
            problem = str(error).removeprefix("error: ")
    return False, f"{problem}; {run.log}"


def play_on_ray(runs: list[Run], address: str | None, tell: Callable[[Run, bool, str], None]) -> None:
    """As many at a time as there are resources for; `tell` is called as each ends."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read as Ray is imported
    if address and Path("~/.ray/auth_token").expanduser().exists():  # which the cluster's head made, since Ray 2.59
        os.environ.setdefault("RAY_AUTH_MODE", "token")
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
    need = {"CPU": runs[0].values["threads"], "GPU": runs[0].gpus}
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
        print("stopping: every run saves; repeat to exit at once", flush=True)
        for task in pending:
            ray.cancel(task)
        ray.wait(list(pending), num_returns=len(pending))
        raise
    finally:
        ray.shutdown()


def print_table(runs: list[Run]) -> None:
    rows = [("index", "task", "label", "seed", "state", "command")]
    for run in runs:
        state = "being played" if run.log.exists() and not lock_log(run) else find_state(run)
        words = shlex.join(command(run)) if state.startswith(("to do", "interrupted")) else ""
        rows.append((str(run.index), run.task, run.label, str(run.seed), state, words))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths[:-1])) + "  " + row[-1])


def main(args: Args) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # both raise KeyboardInterrupt, also where a shell ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    runs = plan_runs(args.matrix, args.runs, args.results)
    if args.only is not None and not 0 <= args.only < len(runs):
        fail(f"--only {args.only}: {args.matrix} has runs 0 to {len(runs) - 1}")
    runs = runs if args.only is None else [runs[args.only]]
    if args.collect:
        return collect(args.collect, runs)
    if args.dry_run:
        return print_table(runs)
    for flag, folder in (("--runs", args.runs), ("--results", args.results)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            fail(f"{flag} {folder} cannot be written: {error.strerror}")
    states = {run.index: find_state(run) for run in runs}
    if wrong := [state for state in states.values() if state.startswith("differs")]:
        fail(f"{wrong[0].removeprefix('differs: ')}; move it away, or give the matrix another name")
    to_play = [run for run in runs if states[run.index] != "done"]
    counts = f"{len(runs)} runs, {len(runs) - len(to_play)} done, {len(to_play)} to play"
    print(f"{args.matrix}: {counts}; logs: {args.runs}/{args.matrix.stem}/", flush=True)
    failures = []

    def tell(run: Run, well: bool, text: str) -> None:
        print(f"{run.name}: {text}", flush=True)
        failures.extend([] if well else [f"failed: {run.name}: {text}"])

    try:
        for run in to_play if args.only is not None else ():
            tell(run, *play(run, os.getcwd()))
        if to_play and args.only is None:
            play_on_ray(to_play, args.address, tell)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        raise SystemExit(130) from None
    if failures:
        raise SystemExit("\n".join(failures))  # to stderr, with exit code 1


if __name__ == "__main__":
    main(tyro.cli(Args, description="\n\n".join(__doc__.split("\n\n")[:2])))
