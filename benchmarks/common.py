"""What all benchmarks share: command-line options, timing in turns, tables and JSON records."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

Numbers = list[dict[str, Any]]
"""One flat record per row of a benchmark's table."""


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has.

    Args:
        description: The benchmark's module docstring.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run: its numbers mean nothing")
    return parser


def interleaved(
    candidates: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time candidates in turns, A B A B ..., so that a disturbance of the machine affects all of them alike.

    Args:
        candidates: Functions without arguments, by name. Each call is followed by a wait for the device.
        repeats: Measured calls of each candidate.
        warm_up: Calls of each candidate that come first and are not measured.

    Returns:
        Seconds of every measured call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(-warm_up, repeats):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each candidate's seconds."""
    return {name: median(taken) for name, taken in seconds.items()}


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the norm of the difference divided by the norm of ``b``."""
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def table(rows: Numbers) -> str:
    """Format records as a markdown table.

    Args:
        rows: At least one; all have the same keys, which become the column heads.
    """
    heads = list(rows[0])
    cells = [heads, ["---"] * len(heads), *([_cell(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(rows: Numbers, arguments: argparse.Namespace, **more: Numbers) -> None:
    """Print the table; with ``--json``, also write the numbers with everything that is needed to judge them.

    Every benchmark runs each process on one thread, and the record says so.

    Args:
        rows: The main table.
        arguments: From a parser made by :func:`options`.
        more: Further tables, by their keys in the record.
    """
    print(*(table(numbers) for numbers in (rows, *more.values())), sep="\n\n")
    if arguments.json is None:
        return
    write_json(arguments.json, {**origin(arguments), "numbers": rows, **more})


def origin(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return where the numbers of this program come from, and the machine."""
    machine = {**hardware(), "threads a process": 1}
    return {**provenance(f"benchmarks.{Path(sys.argv[0]).stem}", arguments), "hardware": machine}


def provenance(module: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return where numbers come from: the command, the date, the seed, and whether it was a smoke run."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "seed": arguments.seed,
    }


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record to a file whose folder need not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def hardware() -> dict[str, Any]:
    """Return the machine and the versions that matter for times."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
