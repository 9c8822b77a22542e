"""Parts of a trial, each with its time and its result, and commands whose failure says what they printed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class TrialError(Exception):
    """A part of the trial failed; the message says how."""


def execute(command: Sequence[str | Path], timeout: float = 1800, **options: object) -> str:
    """Run a command; what it printed, or a TrialError with that."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            text=True,
            errors="replace",
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **options,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout
        raise TrialError(f"{said or ''}no end after {timeout:.0f} s: {' '.join(words)}") from None
    if done.returncode:
        raise TrialError(f"{done.stdout}exit code {done.returncode}: {' '.join(words)}")
    return done.stdout


def expect(holds: object, otherwise: str) -> None:
    """Raise a TrialError unless something holds."""
    if not holds:
        raise TrialError(otherwise)


class Phases:
    """Runs the parts one after the other and keeps their times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, part: Callable[[], str]) -> None:
        start = time.perf_counter()
        try:
            result = part()
        except TrialError as error:
            raise TrialError(f"{error}\n{name}: failed") from error
        self.seconds[name] = time.perf_counter() - start
        print(f"{name:<28}{self.seconds[name]:7.1f} s  {result}", flush=True)
