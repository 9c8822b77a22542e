"""The output folder of a run: checking it at the start, and writing its results at the end.

OUTPUT/metrics.jsonl     the records of the run
OUTPUT/.checkpoints      where the run saves its checkpoints, from the first one on; until then it may be started again
OUTPUT/summary.json      written at the end, with loss.png
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ds_lowrank.checkpoint.owned import check_owned, working_names
from ds_lowrank.training.atomic_write import write_atomically
from ds_lowrank.training.plot import plot_loss
from ds_lowrank.training.records import FILE, read_metrics

logger = logging.getLogger("ds_lowrank")

SUMMARY = "summary.json"
PLOT = "loss.png"
SAVED = ".checkpoints"


class AlreadyFinishedError(Exception):
    """There is nothing left to do; the message says why."""


def check_output(output: Path, resuming: bool, replaces: Iterable[str] = ()) -> None:
    """Check that a run may write to its output folder.

    A run that was interrupted before its first checkpoint counts as none, as it can only be started again.

    Args:
        output: the output folder; it need not exist.
        resuming: whether this run continues an earlier one.
        replaces: the names of the folders in it that this run replaces.

    Raises:
        ValueError: the folder contains another run, which would be overwritten, or metrics that cannot be read.
        FileExistsError: it contains a folder that this run would replace and that no run has written.
    """
    for name in replaces:
        for path in working_names(output / name):
            check_owned(path)
    if resuming:
        if (output / FILE).exists():
            read_metrics(output / FILE)
        return
    for name in (SAVED, SUMMARY, PLOT):
        if (output / name).exists():
            shown = FILE if (output / FILE).exists() else name
            raise ValueError(
                f"{output} already contains a run ({shown}); give another --output, or --resume to continue that run"
            )


def check_restart(output: Path, save: Path, steps: int) -> None:
    """Check that a run with ``--resume`` that finds no checkpoint may start from the beginning.

    Args:
        output: the output folder.
        save: the folder in which there is no checkpoint.
        steps: the run's total number of steps.

    Raises:
        AlreadyFinishedError: the run has finished, without checkpoints.
        ValueError: the run has saved checkpoints, or has ended without any.
    """
    saved = saved_in(output)
    if saved is not None:
        raise ValueError(
            f"nothing to resume: {save} has no checkpoint. The run in {output} saved its checkpoints in {saved}: give "
            "that as --save, or another --output to start again"
        )
    if not (output / SUMMARY).exists():
        return
    try:
        summary = json.loads((output / SUMMARY).read_text())
        done = summary["finished"] is True and summary["step"] == steps
    except (ValueError, KeyError, TypeError):
        done = False
    if done:
        raise AlreadyFinishedError(f"the run in {output} has finished: it is at --steps {steps}")
    raise ValueError(
        f"nothing to resume: {output} contains the results of a run that saved no checkpoint; give another --output"
    )


def check_continued(output: Path, save: Path, checkpoint: Path) -> None:
    """Check that the output folder has no other run than the one that a checkpoint is of.

    Args:
        output: the output folder.
        save: where this run saves its checkpoints.
        checkpoint: the one that it continues from.

    Raises:
        ValueError: it contains another run, whose metrics would be cut.
    """
    saved = saved_in(output)
    if saved is None and checkpoint.parent.resolve() != save.resolve():
        check_output(output, resuming=False)
    if saved is not None and saved != checkpoint.parent.resolve():
        raise ValueError(
            f"{output} contains a run that saved its checkpoints in {saved}, not that of {checkpoint}: give another "
            f"--output, or delete {output / SAVED} if the folder was moved"
        )


def is_new(output: Path, save: Path, checkpoint: Path | None) -> bool:
    """Whether a run that starts from a checkpoint, or from the beginning, has no metrics of its own yet."""
    return saved_in(output) is None and (checkpoint is None or checkpoint.parent.resolve() != save.resolve())


def saved_in(output: Path) -> Path | None:
    """Where the run in an output folder saved its checkpoints; None if it saved none."""
    if not (output / SAVED).exists():
        return None
    where = (output / SAVED).read_bytes().decode(errors="surrogateescape").removesuffix("\n")
    if "\0" in where:
        raise ValueError(f"{output / SAVED} is damaged: delete it to continue the run with its --save")
    return (output / where).resolve()


def begin_output(output: Path) -> None:
    """Make room for a new run: rename the metrics of one that was interrupted before its first checkpoint."""
    metrics = output / FILE
    if not metrics.exists() or not metrics.stat().st_size:
        return
    number = 1
    while (aside := output / f"metrics.{number}.jsonl").exists():
        number += 1
    metrics.rename(aside)
    logger.info("%s is of a run without checkpoints that was interrupted: renamed to %s", metrics, aside.name)


def record_save(output: Path, save: Path) -> None:
    """Note that the run has a checkpoint: from now on it is continued, not started again."""
    if saved_in(output) != save.resolve():
        inside = save.resolve().is_relative_to(output.resolve())  # so that the folder can be moved
        where = save.resolve().relative_to(output.resolve()) if inside else save.resolve()
        write_atomically(output / SAVED, f"{where}\n")


def write_results(output: Path, steps: int, facts: Mapping[str, Any] | None = None) -> None:
    """Draw loss.png, write summary.json and print the summary, from the metrics in the folder.

    Args:
        output: the output folder, with its metrics.jsonl.
        steps: the run's total number of steps.
        facts: further entries of the summary.
    """
    records = read_metrics(output / FILE)
    if not records:
        print(f"{output / FILE} has no record: there is nothing to plot or to sum up")
        return
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
