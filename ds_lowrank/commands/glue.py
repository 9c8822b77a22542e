"""``python -m ds_lowrank glue``: the GLUE scores of several runs, and their average."""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.data.glue import GLUE
from ds_lowrank.errors import ConfigError

ABOUT = "tabulate runs of launch/finetune.py on GLUE tasks, with their average"
LEFT_OUT = "wnli"
"""Papers on GLUE mostly leave it out: its validation examples contradict the training examples by construction.
GradNormLoRP's scripts run it, which is why the table also has the average over all nine."""


@dataclass(frozen=True)
class Score:
    """What a run has reached on its task.

    Attributes:
        run: the folder of the run.
        step: the step of the best model.
        metrics: the task's metrics at that step, from 0 to 1, keyed by name.
        decisive: the metric that the task is best known for, which papers report.
    """

    run: Path
    step: int
    metrics: dict[str, float]
    decisive: float

    @property
    def mean(self) -> float:
        """The mean of the metrics, as GLUE's own score takes it where a task has two."""
        return sum(self.metrics.values()) / len(self.metrics)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run with --data glue:TASK"
    )
    parser.add_argument("--all-nine", action="store_true", help="refuse to average fewer than all nine tasks")


def run(arguments: Namespace) -> int:
    """Print the table; 1 after an error of the user's, which is printed."""
    try:
        print("\n".join(table(arguments.runs, arguments.all_nine)))
    except (ConfigError, OSError) as error:
        print(f"python -m ds_lowrank glue: {error}", file=sys.stderr)
        return 1
    return 0


def table(runs: Sequence[Path], all_nine: bool = False) -> list[str]:
    """The lines of the table, in percent, and of the averages.

    Args:
        runs: the folders of the runs, at most one for each task.
        all_nine: whether no task may be missing.

    Raises:
        ConfigError: a folder is not that of a finished run on a GLUE task, two runs are on the same task, or a task is
            missing that may not.
    """
    scores: dict[str, Score] = {}
    for folder in runs:
        task, score = score_of(folder)
        if task in scores:
            raise ConfigError(f"{folder} and {scores[task].run} are both runs on glue:{task}: give one of them")
        scores[task] = score
    missing = ", ".join(task for task in GLUE if task not in scores)
    if all_nine and missing:
        raise ConfigError(f"no runs on: {missing}; without --all-nine the average is over the others")
    rows = [["task", "score", "mean", "step", "metrics"]]
    for task in (task for task in GLUE if task in scores):
        found = scores[task]
        metrics = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.metrics.items())
        rows.append([task, f"{100 * found.decisive:.1f}", f"{100 * found.mean:.1f}", str(found.step), metrics])
    eight = [task for task in scores if task != LEFT_OUT]
    if eight:
        rows.append(_average("average", [scores[task] for task in eight], len(GLUE) - 1, f"without {LEFT_OUT}"))
    if len(scores) > len(eight):
        rows.append(_average("average", list(scores.values()), len(GLUE), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    return [line.rstrip() for line in (*lines, *([f"no runs on: {missing}"] if missing else []))]


def _average(name: str, scores: Sequence[Score], of: int, note: str) -> list[str]:
    decisive, mean = (sum(values) / len(scores) for values in zip(*((s.decisive, s.mean) for s in scores), strict=True))
    return [name, f"{100 * decisive:.1f}", f"{100 * mean:.1f}", "", f"of {len(scores)} of {of} tasks {note}".rstrip()]


def score_of(folder: Path) -> tuple[str, Score]:
    """The GLUE task of a run, and the metrics of its best model.

    Args:
        folder: the output folder of the run.

    Raises:
        ConfigError: it is not that of a finished run on a GLUE task.
    """
    summary = _read(folder / "summary.json")
    task = str(summary.get("data", "")).removeprefix("glue:")
    if task not in GLUE or not summary["data"].startswith("glue:"):
        raise ConfigError(f"{folder} is a run on {summary.get('data', 'other data')}, and no GLUE task")
    best = summary.get("best")
    if best is None:
        raise ConfigError(f"{folder} has no best model: its losses or metrics were never finite")
    if not summary.get("finished"):
        raise ConfigError(f"{folder} has not finished: it is at step {summary.get('step')}; resume it first")
    records = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    record: dict[str, Any] = next((found for found in records if found["step"] == best["step"]), {})
    names = [f"{prefix}{name}" for prefix in GLUE[task].validation for name in GLUE[task].metrics]
    metrics = {name: record.get(f"eval_{name}", math.nan) for name in names}
    return task, Score(folder, best["step"], metrics, metrics[names[0]])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path.parent} is not the output of a run that has ended: it has no {path.name}")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error})") from error
    return found
