"""The output directory of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_lowrank.training.metrics import FILE, read_metrics
from ds_lowrank.training.plot import plot_loss

SUMMARY = "summary.json"
PLOT = "loss.png"


def check_output(output: Path, resuming: bool) -> None:
    """Raise ValueError where `output` holds a run that this one would overwrite, or metrics that cannot be read."""
    metrics = output / FILE
    if not metrics.exists():
        return
    if not resuming:
        raise ValueError(
            f"{output} already holds a run ({FILE}); give another --output, or --resume to continue that run"
        )
    read_metrics(metrics)


def write_results(output: Path, steps: int, facts: Mapping[str, Any] | None = None) -> None:
    """Draw loss.png, write summary.json and print it, all from the metrics and the `facts` beside them.

    `steps` is the run's full length.
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
    aside = output / f".{SUMMARY}.partial"
    aside.write_text(json.dumps(summary, indent=2) + "\n")
    aside.replace(output / SUMMARY)
    print("\n".join(f"{key}: {value}" for key, value in summary.items()))
