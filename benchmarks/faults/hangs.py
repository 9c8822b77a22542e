"""A rank that stops answering, at every stage of a run: the others name it, and all end within the limit."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.faults.one_rank import before_calls, workspace
from benchmarks.faults.programs import Finished, Running
from benchmarks.faults.trial import Outcome, Trial

LIMIT = 4.0
"""``--timeout``, in seconds; a step takes milliseconds."""
LONGER = 60.0
"""``--setup-timeout`` where a rank is noticed that is stopped, or does nothing while it writes files."""
SECONDS = 25.0
"""Within which all ranks have to end after one has stopped answering: the limit, and the time of two busy cores."""
RANKS = 3


def _loop() -> None:
    while True:
        pass


def _sleep() -> None:
    time.sleep(3600)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _collective() -> None:
    dist.all_reduce(torch.zeros(1, dtype=torch.float32, device="cpu"))


HANGS: dict[str, Callable[[], None]] = {
    "is stopped": _stop,
    "loops": _loop,
    "waits for ever": _sleep,
    "calls a collective too many": _collective,
}
"""How a rank stops answering. A collective too many is answered by the wrong one of the others, or by none."""

STAGES: dict[str, tuple[str, int]] = {
    "opening the data": ("ds_lowrank.training.pretraining_data:open_source", 1),
    "starting the engine": ("ds_lowrank.training.run:start_engine", 1),
    "reading data": ("ds_lowrank.data.batches:BatchStream.next_step", 3),
    "a step": ("ds_lowrank.training.train:train_step", 3),
    "evaluating": ("ds_lowrank.training.evaluation:evaluate", 1),
    "saving": ("ds_lowrank.training.run:random_state_text", 1),
    "exporting": ("ds_lowrank.training.script:export", 1),
}
"""Stages of a run: the function before which a rank hangs, and at its how-manieth call."""


def _hangs(target: str, calls: int, victim: int, how: str, mark: Path, rank: int) -> None:
    """Make a rank hang before it calls a function.

    Args:
        target: the function, as ``module:name``.
        calls: at which call.
        victim: the rank that hangs.
        how: a key of ``HANGS``.
        mark: a file that the rank writes the moment before.
        rank: this rank.
    """

    def act(count: int) -> None:
        if count == calls:
            mark.write_text("")
            HANGS[how]()

    before_calls(target, act, victim, rank)


def hanging(folder: Path, stage: str, how: str, victim: int = 1, ranks: int = RANKS) -> Outcome:
    """Let a rank hang at some stage of a run.

    Args:
        folder: an empty folder.
        stage: a key of ``STAGES``.
        how: a key of ``HANGS``.
        victim: the rank that hangs.
        ranks: how many there are.
    """
    noticed = how == "is stopped" or (how == "waits for ever" and stage in ("saving", "exporting"))
    limits = ("--timeout", f"{LIMIT:g}", "--setup-timeout", f"{LONGER if noticed else LIMIT:g}")
    config = {"train_batch_size": 2 * ranks}
    arguments = workspace(folder, 6, *limits, "--save-interval", "4", "--eval-interval", "3", "--export", config=config)
    mark = folder / "hangs"
    prepare = partial(_hangs, *STAGES[stage], victim, how, mark)
    running = Running("pretrain", arguments, ranks, folder, prepare)
    if not running.wait_for(mark.exists, 120):
        return Outcome("no message", f"{victim} did not get there: {running.finish(1).err[-300:]}")
    started = time.monotonic()
    others = [process for rank, process in enumerate(running.processes) if rank != victim]
    for process in others:
        process.join(max(0.0, started + SECONDS - time.monotonic()))
    took = time.monotonic() - started
    if how == "is stopped":  # and a launcher does this
        running.send(signal.SIGKILL, victim)
    return _judge(running.finish(10), victim, took, how)


def _judge(finished: Finished, victim: int, took: float, how: str) -> Outcome:
    """Whether all have ended in time, and one of the others names the rank that hangs and where it does."""
    outcome = finished.refusal()
    if took >= SECONDS:
        return Outcome("hang", f"{took:.0f} s: {finished.err[-300:]}")
    if outcome.verdict != "refused" or 0 in finished.codes:
        return Outcome(outcome.verdict, f"{finished.codes}: {finished.err[-300:]}")
    named = f"no answer from rank {victim} within .* {LIMIT:g} s: stopped, or hanging"
    if how == "calls a collective too many":  # then all wait for each other, or gloo aborts on a wrong size
        named = (
            rf"no answer from another rank .*; last seen: .*\brank {victim} in |another rank is gone \(rank {victim}"
        )
    lines = [line for line in finished.err.splitlines() if re.match(rf"rank [^{victim}]: error: ({named})", line)]
    if not lines:
        return Outcome("no message", finished.err[-400:])
    stack = f"rank {victim}: error: the other ranks have waited for this one in vain, which is still in"
    if how in ("loops", "waits for ever") and stack not in finished.err:
        return Outcome("no message", finished.err[-400:])
    return Outcome("refused", lines[0])


COMPACT = {
    ("loops", "reading data"),
    ("is stopped", "evaluating"),
    ("calls a collective too many", "a step"),
    ("waits for ever", "saving"),
}


def trials() -> list[Trial]:
    """Every way to hang at every stage; and rank 0, which keeps the store that the others ask."""
    found = [
        Trial(f"rank 1 {how} before {stage}", partial(hanging, stage=stage, how=how), (how, stage) in COMPACT)
        for stage in STAGES
        for how in HANGS
    ]
    return found + [
        Trial(
            f"rank 0 {how} before {stage}",
            partial(hanging, stage=stage, how=how, victim=0),
            stage == "opening the data" and how == "is stopped",
        )
        for stage in ("opening the data", "a step", "saving")
        for how in ("is stopped", "loops")
    ]
