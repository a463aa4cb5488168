"""Export runs to small files that can be committed: the return curve, and the arguments with the final evaluation.

    python benchmark/collect.py RUN_DIR ... --matrix headline --arm sprig

benchmark/run.py does this for the runs of a matrix; this is for those made by hand. Each run becomes
`<results>/<matrix>/<task>/<arm>_seed<n>.csv.gz` and the same name with .json:

- csv.gz: agent_steps, seconds, episodic_return, episodic_length of each whole game finished in training, in order. The
  same rows give the same bytes. `seconds` counts from the beginning of the training, start-up excluded, to the end of
  the rollout in which the game ended. Of a resumed run the sittings are added up, without the time between them and
  without what an interrupted sitting did after its last checkpoint, which was done again.
- json: args.json (script, arguments, protocol, versions), the hardware, the steps trained, the final evaluation.
"""

import csv
import gzip
import io
import json
import os
import platform
import re
import subprocess
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from speed import cpu_model

LABEL = "[a-z0-9-]+"  # of an arm, and the name of a matrix


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders"""
    matrix: str
    """matrix that the runs belong to"""
    arm: str
    """label of their arm in it"""
    results: Path = Path("benchmark/results")
    """folder of the matrices' results"""


def fail(message: str):
    raise SystemExit(f"error: {message}")


def render(head: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|-" * len(head) + "|", *lines[1:]])


def hardware(gpu: bool) -> dict:
    """Of this machine; `gpu` says whether the run may use one."""
    name = None
    if gpu:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            pass  # no such GPU
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "gpu": name}


def write(path: Path, data: bytes) -> None:
    """All or nothing: whoever finds the file finds it whole."""
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def file_name(task: str) -> str:
    """Of a task's folders: its id, without what a file system does not take."""
    return task.replace("/", "-").replace(":", "-")  # Windows takes no colon


def result_path(results: Path, matrix: str, task: str, arm: str, seed: int) -> Path:
    """The .json of a run; its .csv.gz lies beside it."""
    return results / matrix / file_name(task) / f"{arm}_seed{seed}.json"


def write_result(path: Path, games: list[tuple], record: dict) -> None:
    """`games`: (agent step, seconds, return, length) of each; `record`: what the .json holds."""
    rows = io.StringIO(newline="")
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["agent_steps", "seconds", "episodic_return", "episodic_length"])
    for step, seconds, score, length in games:
        writer.writerow([step, round(seconds, 1), f"{score:.7g}", round(length)])
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        file.write(rows.getvalue().encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path.with_suffix(".csv.gz"), packed.getvalue())
    write(path, (json.dumps(record, indent=2) + "\n").encode())


def whole_games(events) -> list[tuple]:
    """(return, length) of each game, as TensorBoard's scalars, from an EventAccumulator. A short run may have none."""
    tags = ("charts/episodic_return", "charts/episodic_length")
    known = events.Tags()["scalars"]
    return list(zip(*(events.Scalars(tag) for tag in tags if tag in known)))


def training_seconds(speed: list, sittings: set[int]) -> list[float]:
    """Seconds since the training began at each point of charts/SPS. `sittings`: the steps at which it was resumed.

    The first point of a sitting is timed by its own speed, each further one by the clock.
    """
    seconds, step, wall_time = [], 0, 0.0
    for point in speed:
        first = step == 0 or step in sittings
        elapsed = (point.step - step) / point.value if first else point.wall_time - wall_time
        seconds.append(elapsed + (seconds[-1] if seconds else 0))
        step, wall_time = point.step, point.wall_time
    return seconds


def export(run: Path, path: Path) -> tuple[dict, float]:
    """Write the .csv.gz beside `path`, then `path`, the .json. Returns what that holds, and the training's seconds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = json.loads((run / "args.json").read_text())
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    if "charts/SPS" not in events.Tags()["scalars"]:
        fail(f"{run} holds no finished iteration")
    speed = events.Scalars("charts/SPS")
    ends = [point.step for point in speed]
    seconds = training_seconds(speed, {sitting["step"] for sitting in record.get("resumed", [])})
    games = [
        (score.step, seconds[bisect_left(ends, score.step)], score.value, length.value)
        for score, length in whole_games(events)
        if score.step <= ends[-1]  # a killed run may have logged games of an iteration that it did not finish
    ]
    record["arguments"]["run_dir"] = ""  # of no use elsewhere
    noted = run / "hardware.json"  # by run.py
    gpu = record["arguments"]["device"] != "cpu" and not record["versions"]["torch"].endswith("+cpu")
    record["hardware"] = json.loads(noted.read_text()) if noted.exists() else hardware(gpu)
    record["trained_steps"] = ends[-1]
    evaluation = run / "evaluation.json"
    record["evaluation"] = json.loads(evaluation.read_text()) if evaluation.exists() else None
    write_result(path, games, record)
    return record, seconds[-1]


def main(args: Args) -> None:
    """Export each of `args.runs`. Nothing is overwritten: a result that is there already ends the program."""
    if not re.fullmatch(LABEL, args.arm):
        fail(f"--arm {args.arm} is not a label of a matrix: small letters, digits and hyphens")
    if not re.fullmatch(LABEL, args.matrix):
        fail(f"--matrix {args.matrix} is not the name of a matrix: small letters, digits and hyphens")
    paths = {}
    for run in args.runs:
        try:
            arguments = json.loads((run / "args.json").read_text())["arguments"]
            task, seed = str(arguments["env_id"]), int(arguments["seed"])
            path = result_path(args.results, args.matrix, task, args.arm, seed)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{run} is not the folder of a run: args.json: {error}")
        if path.exists() or path in paths:
            fail(f"{path} is there already; {run} would replace it")
        paths[path] = run
    for path, run in paths.items():
        try:
            record, seconds = export(run, path)
        except (OSError, ValueError, KeyError) as error:
            fail(f"{run} cannot be exported: {error!r}")
        print(f"{path}: {record['trained_steps']} steps in {seconds:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
