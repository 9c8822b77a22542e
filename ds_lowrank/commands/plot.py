"""``python -m ds_lowrank plot``: the loss curves of one run, or of several in one picture."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

ABOUT = "draw the losses of runs over steps, tokens and hours"

OVER = ("steps", "tokens", "hours")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an --output folder, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="the PNG file to write: loss.png")
    parser.add_argument("--x", choices=OVER, help="one panel over this; without it, one over each")


def run(arguments: Namespace) -> int:
    """Draw the picture; 1 with one line if a run has no curve, or the file cannot be written."""
    try:
        runs = {name: records_of(path) for name, path in named(arguments.runs).items()}
        draw(runs, arguments.output, [arguments.x] if arguments.x else list(OVER))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.output}")
    return 0


def named(paths: list[Path]) -> dict[str, Path]:
    """Give each run the end of its path that tells it from the others.

    Raises:
        ValueError: a run is given twice.
    """
    folders = [Path(os.path.abspath(path)) for path in paths]
    folders = [path.parent if path.name == "metrics.jsonl" else path for path in folders]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise ValueError(f"{paths[number]} is given twice")
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [str(Path(*folder.parts[-length:])) for folder in folders]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, paths, strict=True))


def records_of(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run.

    Raises:
        ValueError: there are none, or something in the file is not a record.
        OSError: the file cannot be read.
    """
    from ds_lowrank.training.records import FILE, read_metrics

    if not path.exists():
        raise ValueError(f"{path} does not exist: give the --output folder of a run")
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path} has no {FILE}: give the --output folder of a run")
    records = read_metrics(file)
    if not any(record["loss"] is not None for record in records):
        raise ValueError(f"{file} has no losses yet: the run has not logged a step")
    return records


def draw(runs: dict[str, list[dict[str, Any]]], output: Path, over: list[str]) -> None:
    """Write the picture.

    Raises:
        ValueError: the file is no PNG or has no folder, or matplotlib is not installed.
        OSError: it cannot be written.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: it is written as PNG, so let it end in .png")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")
    try:
        from ds_lowrank.training.plot import plot_runs
    except ModuleNotFoundError as error:
        raise ValueError(f"plot needs {error.name}: pip install '.[train]'") from None
    plot_runs(runs if len(runs) > 1 else {"": next(iter(runs.values()))}, output, over)
