"""Faults of one rank alone, at every stage of a run: that rank says what it was, and the other ends."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

from benchmarks.faults.programs import MODEL, Running, run
from benchmarks.faults.trial import Outcome, Trial

SECONDS = 15.0
"""Within which the last rank has to end after the first. Alone on a machine it takes up to four."""


def workspace(folder: Path, steps: int, *more: str, config: dict[str, Any] | None = None) -> list[str]:
    """Make a folder with a model that steps in milliseconds and a text, and return a command line for them.

    Args:
        folder: the folder; files in it are replaced.
        steps: the run's number of steps.
        more: further arguments.
        config: entries of the DeepSpeed configuration to replace.
    """
    (folder / "model.json").write_text(json.dumps(MODEL))
    settings = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "GaLore", "params": {"lr": 0.01, "rank": 8, "update_proj_gap": 2}},
        "zero_optimization": {"stage": 2},
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "text").mkdir(exist_ok=True)
    for number in range(100):  # enough that one in twenty is held out
        (folder / "text" / f"{number}.txt").write_text(" ".join(f"{(number * step) % 97}" for step in range(150)))
    return [
        *("--deepspeed_config", "config.json", "--model", "model.json", "--data", "text", "--tokenizer", "bytes"),
        *("--sequence-length", "32", "--steps", str(steps), "--log-interval", "1", "--eval-sequences", "4"),
        *("--cache", "cache", "--output", "run", *more),
    ]


def before_calls(target: str, act: Callable[[int], None], victim: int, rank: int) -> None:
    """Do something on one rank before every call of a function.

    Args:
        target: the function, as ``module:name``.
        act: is given which call it is, counted from 1.
        victim: the rank on which it is done.
        rank: this rank.
    """
    if rank != victim:
        return
    original, count = resolve_name(target), 0

    def replaced(*args: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        act(count)
        return original(*args, **named)

    patch(target.replace(":", "."), replaced).start()


def raises(target: str, error: Exception, calls: int, victim: int, rank: int) -> None:
    """Make a function raise on one rank.

    Args:
        target: the function, as ``module:name``.
        error: what it raises.
        calls: from which call on.
        victim: the rank on which it raises.
        rank: this rank.
    """

    def act(count: int) -> None:
        if count >= calls:
            raise error

    before_calls(target, act, victim, rank)


def _dies(target: str, rank: int) -> None:
    """Make a function end the process of rank 0, as the kernel does when memory runs out."""
    if rank == 0:
        patch(target.replace(":", "."), lambda *args, **named: os.kill(os.getpid(), 9)).start()


FULL = OSError(errno.ENOSPC, "No space left on device", "a file of rank 1")
"""What a full disk gives; only rank 1 has it in these trials."""

FAULTS: dict[str, tuple[str, Exception, int]] = {
    "planning": ("ds_lowrank.training.plan:make_plan", ValueError("a setting of rank 1"), 1),
    "opening the data": ("ds_lowrank.training.pretraining_data:open_source", FULL, 1),
    "building the model": ("ds_lowrank.models.llama:build", ValueError("a model of rank 1"), 1),
    "starting the engine": ("ds_lowrank.training.run:start_engine", ValueError("an engine of rank 1"), 1),
    "reading data": ("ds_lowrank.data.batches:BatchStream.next_step", FULL, 3),
    "a step": ("ds_lowrank.training.train:train_step", MemoryError("rank 1 is out of memory"), 3),
    "evaluating": ("ds_lowrank.training.evaluation:evaluate", FULL, 1),
    "collecting what to save": ("ds_lowrank.training.run:random_state_text", FULL, 1),
    "writing a checkpoint": ("ds_lowrank.integration.checkpoint:write_pieces", FULL, 1),
    "exporting": ("ds_lowrank.training.script:export", FULL, 1),
}
"""Stages of a run: what raises on rank 1, and at its how-manieth call."""


def alone(folder: Path, target: str, error: Exception, calls: int) -> Outcome:
    """A fault of rank 1 during a run.

    Args:
        folder: an empty folder.
        target: the function that raises there, as ``module:name``.
        error: what it raises.
        calls: from which call on.
    """
    arguments = workspace(folder, 6, "--save-interval", "4", "--eval-interval", "3", "--export")
    return _judge(folder, arguments, partial(raises, target, error, calls, 1), str(error))


def resuming(folder: Path) -> Outcome:
    """A fault of rank 1 while it goes to its position in the data."""
    first = run("pretrain", workspace(folder, 2, "--save-interval", "2"), 2, folder)
    if not first.succeeded:
        return Outcome("cannot go on", first.err[-300:])
    arguments = workspace(folder, 4, "--resume")
    target = "ds_lowrank.data.batches:BatchStream.load_state_dict"
    return _judge(folder, arguments, partial(raises, target, FULL, 1, 1), str(FULL))


def bug(folder: Path) -> Outcome:
    """An error of rank 1 that nobody foresaw: a traceback, of which every line has the rank."""
    arguments = workspace(folder, 4)
    target = "ds_lowrank.training.train:train_step"
    running = Running("pretrain", arguments, 2, folder, partial(raises, target, KeyError("unforeseen"), 2, 1))
    finished = running.finish()
    lines = [line for line in finished.err.splitlines() if "another rank failed" not in line]
    if finished.hung or finished.succeeded:
        return Outcome("hang" if finished.hung else "accepted", finished.err[-300:])
    if not any(line.startswith("rank 1: KeyError: 'unforeseen'") for line in lines):
        return Outcome("no message", finished.err[-300:])
    stray = [line for line in lines if not line.startswith("rank 1: ")]
    return Outcome("traceback", stray[0]) if stray else Outcome("refused", lines[-1])


def dies_during_a_save(folder: Path) -> Outcome:
    """Rank 0 is killed between the files of a checkpoint; rank 1 says in one line that it is gone."""
    arguments = workspace(folder, 6, "--save-interval", "2")
    return _judge(
        folder, arguments, partial(_dies, "ds_lowrank.integration.checkpoint.complete"), "another rank is gone"
    )


def _judge(folder: Path, arguments: list[str], prepare: Callable[[int], None], expected: str) -> Outcome:
    """Whether rank 1 says what is expected, in one line with its number, and both ranks end in time."""
    running = Running("pretrain", arguments, 2, folder, prepare)
    running.wait_for(lambda: not all(process.is_alive() for process in running.processes), timeout=120)
    started = time.monotonic()
    finished = running.finish()
    took = time.monotonic() - started
    lines = finished.err.splitlines()
    outcome = finished.refusal()
    if outcome.verdict != "refused":
        return Outcome(outcome.verdict, finished.err[-300:])
    own = [line for line in lines if line.startswith("rank 1: error: ")]
    if len(own) != 1 or expected not in own[0]:
        return Outcome("no message", finished.err[-300:])
    other = [line for line in lines if line not in own]
    if len(other) > 1 or any(not line.startswith("rank 0: error: ") for line in other):
        return Outcome("no message", "\n".join(other))
    if 1 not in finished.codes:
        return Outcome("no message", f"exit codes {finished.codes}")
    return Outcome("refused", own[0]) if took < SECONDS else Outcome("hang", f"{took:.0f} s")


COMPACT = {"reading data", "starting the engine", "exporting"}


def trials() -> list[Trial]:
    """Every stage, and ranks that die without a word."""
    return [
        *(
            Trial(name, partial(alone, target=t, error=e, calls=n), name in COMPACT)
            for name, (t, e, n) in FAULTS.items()
        ),
        Trial("resuming", resuming),
        Trial("a bug", bug, True),
        Trial("killed during a save", dies_during_a_save, True),
    ]
