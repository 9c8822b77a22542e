"""A request to stop that every rank obeys at the same step."""

import os
import signal
import time
from types import FrameType

import torch
from torch import distributed

# A terminal, a scheduler and a launcher may each deliver the same request; only what comes later is a second one.
SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag, to be agreed on at a step boundary.

    A second Ctrl-C, a second or more after the first, ends the process at once. A repeated SIGTERM does not: launchers
    pass on what the scheduler already delivered, and both have SIGKILL to insist.
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
        """Whether any rank was asked to stop. Collective: launchers signal one rank at a time."""
        flag = torch.tensor([self._first is not None], dtype=torch.int32, device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag.item())
