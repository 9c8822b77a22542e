"""The output folder of a run: checking it at the start, and writing its results at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_lowrank.training.atomic_write import write_atomically
from ds_lowrank.training.metrics import FILE, read_metrics
from ds_lowrank.training.plot import plot_loss

SUMMARY = "summary.json"
PLOT = "loss.png"


def check_output(output: Path, resuming: bool) -> None:
    """Check that a run may write to its output folder.

    Args:
        output: the output folder; it need not exist.
        resuming: whether this run continues an earlier one.

    Raises:
        ValueError: the folder contains another run, which would be overwritten, or metrics that cannot be read.
    """
    metrics = output / FILE
    if not metrics.exists():
        return
    if not resuming:
        raise ValueError(
            f"{output} already contains a run ({FILE}); give another --output, or --resume to continue that run"
        )
    read_metrics(metrics)


def write_results(output: Path, steps: int, facts: Mapping[str, Any] | None = None) -> None:
    """Draw loss.png, write summary.json and print the summary, from the metrics in the folder.

    Args:
        output: the output folder, with its metrics.jsonl.
        steps: the run's total number of steps.
        facts: further entries of the summary.
    """
    records = read_metrics(output / FILE)
    plot_loss(records, output / PLOT)
    last = records[-1]
    evaluated = [record for record in records if "eval_loss" in record]
    summary = {
        "finished": last["step"] == steps,
        "step": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
        "loss": last["loss"],
        "eval_loss": None,
        **({key: value for key, value in evaluated[-1].items() if key.startswith("eval_")} if evaluated else {}),
        "memory_gib": last["memory_gib"],
        "skipped_steps": last["skipped_steps"],
        **(facts or {}),
    }
    write_atomically(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    print("\n".join(f"{key}: {value}" for key, value in summary.items()))
