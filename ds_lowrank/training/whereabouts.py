"""What the main thread of a rank does, for the others, who name the rank when it stops answering."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).resolve().parents[1]
OWN = (f"{PACKAGE}{os.sep}", f"{PACKAGE.with_name('launch')}{os.sep}")
WAITING = tuple(os.path.join(*parts) for parts in (("torch", "distributed", ""), ("deepspeed", "comm", "")))
"""In files of these folders the main thread waits for other ranks."""
WORKING = 0.01
"""A process that uses at least this share of a core works."""
BYTES = 2**16
"""So does one that reads or writes this many bytes between two looks."""


class Stage(Enum):
    """What is expected of a rank that others wait for."""

    SETUP = "set-up"
    """It may wait for a download, a compiler or another process for as long as ``--setup-timeout``."""
    STEP = "step"
    """It answers within ``--timeout``, or a collective raises."""
    FILES = "files"
    """It works alone for as long as ``--setup-timeout``, but it works all the time."""


_now: tuple[Stage, str] = (Stage.SETUP, "the set-up")


def enter(stage: Stage, text: str) -> None:
    """Note what the main thread does from now on.

    Args:
        stage: what is expected of it.
        text: for a message, after "in": ``step 41, reading data``.
    """
    global _now
    _now = stage, text


@dataclass(frozen=True)
class Sign:
    """What a rank was last seen doing.

    Attributes:
        stage: the value of a ``Stage``.
        text: the stage in words.
        place: the function and line of this package that the main thread is in.
        waits: whether it waits for other ranks there.
        still: for how many seconds it has not moved.
        idle: for how many seconds the process has neither computed nor read nor written anything.
    """

    stage: str
    text: str
    place: str = ""
    waits: bool = False
    still: float = 0.0
    idle: float = 0.0

    def __str__(self) -> str:
        """In words, after "in"."""
        return self.text + (f" ({self.place})" if self.place else "")

    def dumps(self) -> str:
        """As one line of text."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, line: str) -> Sign:
        """Read what :meth:`dumps` returned."""
        return cls(**json.loads(line))


def current() -> Sign:
    """What the main thread has entered, without a look at it."""
    stage, text = _now
    return Sign(stage.value, text)


class Observer:
    """Watches the main thread of this process from another thread, now and then."""

    def __init__(self) -> None:
        self._where: tuple[object, ...] = ()
        self._looked = self._moved = self._worked = time.monotonic()
        self._spent, self._bytes = time.process_time(), _bytes()

    def look(self) -> Sign:
        """What the main thread does now, compared with the last look."""
        now, spent, transferred = time.monotonic(), time.process_time(), _bytes()
        stack = main_stack()
        where = tuple((frame.f_code, frame.f_lasti) for frame in stack)
        if where != self._where:
            self._moved = now
        if spent - self._spent >= WORKING * (now - self._looked) or transferred - self._bytes >= BYTES:
            self._worked = now
        self._where, self._looked, self._spent, self._bytes = where, now, spent, transferred
        stage, text = _now
        return Sign(stage.value, text, _place(stack), waits(stack), now - self._moved, now - self._worked)


def main_stack() -> list[FrameType]:
    """The frames of the main thread, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def described() -> str:
    """Where the main thread is now: what it does, then its stack, outermost line first."""
    stack = main_stack()
    lines = traceback.format_stack(stack[0]) if stack else []
    return f"{_now[1]}:\n" + "".join(lines)


def waits(stack: list[FrameType]) -> bool:
    """Whether a thread waits for other ranks.

    Args:
        stack: its frames, innermost first.
    """
    for frame in stack:
        if frame.f_code.co_filename.startswith(OWN):
            return False
        if any(folder in frame.f_code.co_filename for folder in WAITING):
            return True
    return False


def _place(stack: list[FrameType]) -> str:
    for frame in stack:
        code = frame.f_code
        if code.co_filename.startswith(OWN):
            return f"{os.path.basename(code.co_filename)}:{frame.f_lineno}, {code.co_name}"
    return ""


def _bytes() -> int:
    """What this process has read and written, in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/io") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(("rchar", "wchar")))
    except OSError:
        return 0
