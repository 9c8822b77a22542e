"""The quick start's loss curve on a grid of tensor- and pipeline-parallel ranks, compared with one process.

python -m benchmarks.grid_curve --work runs/grid_curve --picture docs/images/grid.png
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import Numbers, options, report
from benchmarks.plots import picture
from benchmarks.runs import ROOT, working_folder

CONTENDERS = {
    "one process": (1, []),
    "TP 2 x PP 2": (4, ["--tensor-parallel", "2", "--pipeline-parallel", "2"]),
}


def train(name: str, work: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the quick start through the ``deepspeed`` launcher and return the records of its metrics.jsonl.

    Raises:
        RuntimeError: The run failed; the message ends with its output.
    """
    ranks, flags = CONTENDERS[name]
    output = work / name.replace(" ", "_")
    shutil.rmtree(output, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)),
        *("launch/pretrain.py", "--deepspeed_config", "ds_configs/galore_zero1.json"),
        *("--model", "ds_configs/models/llama_quickstart.json", "--sequence-length", "128"),
        *("--steps", str(arguments.steps), "--global-batch-size", "16", "--micro-batch-size", "4"),
        *("--eval-interval", str(max(1, arguments.steps // 4)), "--eval-sequences", "32", "--save-interval", "0"),
        *("--seed", str(arguments.seed), "--output", str(output.resolve()), *flags),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw training losses over the steps: the first run as a line, the other as marks."""
    with picture(path, (7, 4.5), [1]) as (axes,):
        for (name, records), style in zip(runs.items(), ("-", "x"), strict=True):
            points = [(record["step"], record["loss"]) for record in records]
            axes.plot(*zip(*points, strict=True), style, label=name)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss (nats per token)")


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the runs here")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--picture", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps = 4
    with working_folder(arguments.work) as work:
        runs = {name: train(name, work, arguments) for name in CONTENDERS}
    alone, grid = runs.values()
    rows: Numbers = [
        {
            "step": a["step"],
            "one process": a["loss"],
            "TP 2 x PP 2": b["loss"],
            "difference": abs(b["loss"] - a["loss"]),
            "eval, one process": a.get("eval_loss"),
            "eval, TP 2 x PP 2": b.get("eval_loss"),
        }
        for a, b in zip(alone, grid, strict=True)
    ]
    report(rows, arguments)
    if arguments.picture is not None:
        draw(runs, arguments.picture)


if __name__ == "__main__":
    main()
