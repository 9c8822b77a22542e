"""Time limits of the GPU entry: every section has a share, and what it leaves unused goes to the next one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from types import FrameType

GRACE = 10.0
"""Seconds by which a cell that has started may overrun its section before it is interrupted."""


class OutOfTimeError(Exception):
    """A cell was interrupted because its section's time was used up."""


class Budget:
    """Deadlines of consecutive sections.

    Args:
        seconds: All sections together, from now.
        shares: The part of each section, in the order in which they run.
    """

    def __init__(self, seconds: float, shares: Mapping[str, float]) -> None:
        start, scale = time.monotonic(), seconds / sum(shares.values())
        ends = accumulate(share * scale for share in shares.values())
        self._deadlines = {name: start + end for name, end in zip(shares, ends, strict=True)}

    def left(self, section: str) -> float:
        """Return the seconds until the section has to end; negative if that has passed."""
        return self._deadlines[section] - time.monotonic()


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise an exception in the body, in the main thread, when it takes longer.

    A single call into a native library is only interrupted when it returns.

    Raises:
        OutOfTimeError: The time is used up.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"interrupted after {seconds:.0f} s: the section's time is used up")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
