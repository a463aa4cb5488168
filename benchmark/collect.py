"""Export finished runs to small files that can be committed: the return curve and the final evaluation.

    python benchmark/collect.py runs/<run> ... --output benchmark/results/beamrider
    python benchmark/collect.py runs/<run> ... --output benchmark/results/continuous   # a folder per task below it

For each run: `<script>_<label>_seed<n>.csv` (agent_steps, seconds, episodic_return, episodic_length of each whole
game played in training) and a .json beside it (args.json, the final evaluation, steps trained).
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional]
    """run folders"""
    output: Path = Path("benchmark/results/beamrider")
    """folder of the exported files"""
    label: str = "default"
    """what tells these runs from others of the same script"""


def main(args: Args) -> None:
    for run in args.runs:
        record = json.loads((run / "args.json").read_text())
        folder = args.output
        if "continuous" in record["script"]:
            folder = folder / record["arguments"]["env_id"].replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        known = events.Tags()["scalars"]  # a short run may have finished no game
        tags = [tag for tag in ("charts/episodic_return", "charts/episodic_length") if tag in known]
        returns, lengths = map(events.Scalars, tags) if tags else ([], [])
        speed = events.Scalars("charts/SPS")
        start = speed[0].wall_time - speed[0].step / speed[0].value
        evaluation = run / "evaluation.json"
        record["arguments"]["run_dir"] = ""  # of no use elsewhere
        record["trained_steps"] = speed[-1].step
        record["evaluation"] = json.loads(evaluation.read_text()) if evaluation.exists() else None
        name = f"{Path(record['script']).stem}_{args.label}_seed{record['arguments']['seed']}"
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["agent_steps", "seconds", "episodic_return", "episodic_length"])
            for score, length in zip(returns, lengths):
                writer.writerow([score.step, round(score.wall_time - start), f"{score.value:.7g}", round(length.value)])
        (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
        print(f"{name}: {len(returns)} games over {speed[-1].step} steps")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
