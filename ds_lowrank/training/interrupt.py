"""Stopping on a signal, with every rank stopping after the same step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

# A terminal, a scheduler and a launcher may each deliver the same request. Only a later signal is a second request.
SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """A request to stop: turns SIGTERM and SIGINT into a flag, on which the ranks agree between two steps.

    A second Ctrl-C, more than a second after the first signal, ends the process immediately. A repeated SIGTERM does
    not: launchers forward what the scheduler has already delivered, and both can still use SIGKILL.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif number == signal.SIGINT and now - self._first > SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop, as launchers signal one rank at a time. Collective.

        Args:
            device: the device of the process group's tensors.
        """
        flag = torch.tensor([self._first is not None], dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
