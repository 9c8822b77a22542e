"""Stopping when asked, with every rank stopping after the same step; and ending at once when asked again."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from ds_lowrank.training.console import tell
from ds_lowrank.training.launcher import Launchers

# A terminal, a scheduler and a launcher may each deliver the same request. Only a later signal is a second request.
SAME_REQUEST_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A request to stop: SIGTERM, Ctrl-C, or the end of the launcher that started this process.

    The first signal only sets a flag; the ranks look at it between two steps. A second one, more than a second after
    the first, ends the process immediately. It does so while the process waits in a collective for a rank that does
    not answer, where Python runs no signal handlers: the interpreter writes each signal's number to a pipe the moment
    it arrives, and a thread reads the pipe.

    Args:
        rank: this process's rank, for its messages.
        launchers: the launchers above this process.
    """

    def __init__(self, rank: int = 0, launchers: Launchers | None = None) -> None:
        self._rank = rank
        self._launchers = launchers or Launchers()
        self._first: float | None = None
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        for number in SIGNALS:
            signal.signal(number, _wake)
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        # Or a signal to a forked helper would count as one to this rank.
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_restore)
        threading.Thread(target=self._watch, args=(reads,), name="signals", daemon=True).start()

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop, or has lost its launcher."""
        return self._first is not None or self._launchers.lost() is not None

    @property
    def reason(self) -> str:
        """Why the run stops, for a message. It may also be that another rank was asked."""
        lost = None if self._first is not None else self._launchers.lost()
        return "asked to stop" if lost is None else f"{lost} is gone: stopped"

    def _watch(self, pipe: int) -> None:
        while received := os.read(pipe, 1):
            if received[0] in SIGNALS:
                self._receive(received[0])

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if self._rank == 0:
                tell("asked to stop: saving after this step; another signal ends the run at once")
        elif now - self._first > SAME_REQUEST_SECONDS:
            tell(f"rank {self._rank}: ended at once by a second signal; --resume continues from the last checkpoint")
            os._exit(128 + number)


def _wake(number: int, frame: FrameType | None) -> None:
    """Do nothing: a Python handler must be installed for the interpreter to write to the pipe."""


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _restore() -> None:
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _unblock()
