"""How long DeepSpeed reduces gradients after a backward pass, by a timer of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TIMER = "ds_lowrank_reduction"


@contextmanager
def reduction_timed(engine: Any) -> Iterator[Callable[[], float]]:
    """Time the reductions of gradients that backward passes do not hide.

    DeepSpeed starts and stops these timers between the end of a backward pass and the end of ``engine.backward``. On a
    card they are events on the stream, so nothing is waited for until they are read.

    Args:
        engine: DeepSpeed's, without a pipeline.

    Yields:
        A function that returns the seconds so far, and waits for the device.
    """
    names = engine.engine_timers.backward_reduce_timers
    timer = engine.timers(TIMER)
    timer.reset()
    names.append(TIMER)
    try:
        yield lambda: float(timer.elapsed(reset=False)) / 1000
    finally:
        names.remove(TIMER)
