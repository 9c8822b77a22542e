"""How long the optimizer takes to find new bases, without a wait for the device."""

from __future__ import annotations

import time
from collections import deque

import torch

Mark = float | torch.Event


class RefreshClock:
    """Adds up the time between pairs of marks.

    On a CPU a mark is a time. On a card it is an event on the stream, which is read when the card has passed it.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._pending: deque[tuple[torch.Event, torch.Event]] = deque()

    def mark(self, device: torch.device) -> Mark:
        """Mark this point of the work.

        Args:
            device: where the work is done.
        """
        if device.type in ("cpu", "meta"):
            return time.perf_counter()
        event = torch.Event(device.type, enable_timing=True)
        event.record()
        return event

    def add(self, start: Mark, end: Mark) -> None:
        """Count the time between two marks."""
        if isinstance(start, torch.Event) and isinstance(end, torch.Event):
            self._pending.append((start, end))
            while self._pending and self._pending[0][1].query():  # so that they do not become many
                self._take()
        elif isinstance(start, float) and isinstance(end, float):
            self._total += end - start

    def seconds(self) -> float:
        """The time so far. Waits for the device."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._take()
        return self._total

    def _take(self) -> None:
        start, end = self._pending.popleft()
        self._total += start.elapsed_time(end) / 1000
