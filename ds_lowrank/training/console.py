"""The console of a run: streams that may be closed or full, or a pipe whose reader is gone."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ds_lowrank.checkpoint.disk import is_full, is_of_a_write


class OutputError(RuntimeError):
    """A file in the output folder, or the console, cannot be written."""


class ConsoleError(OutputError):
    """Only the console cannot be written, so that everything else of the run is in order."""


@contextmanager
def explained(what: Path | None = None) -> Iterator[None]:
    """Turn the error of a write into an ``OutputError`` that says what to do.

    Args:
        what: the file that is written; None for the console.

    Raises:
        ConsoleError: the console could not be written.
        OutputError: the file could not be written.
    """
    try:
        yield
    except Exception as error:
        if not is_of_a_write(error):
            raise
        advice = "make room" if is_full(error) else "mend that"
        if isinstance(error, BrokenPipeError):
            advice = "its reader has ended: send it to a file or to a reader that stays"
        reason = getattr(error, "strerror", None) or error
        kind = ConsoleError if what is None else OutputError
        shown = what or "the console output"
        raise kind(f"{shown} cannot be written: {reason}; {advice}, and continue with --resume") from error


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """A handler for standard output that leaves an error to the next line of the run, which all ranks learn of."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def handleError(self, record: logging.LogRecord) -> None:
        """Report an error of the program, and none of the stream."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def tell(text: str) -> None:
    """Print a line to standard error in one call, so that lines of several ranks are not mixed, if it can be written.

    Args:
        text: the line, or several.
    """
    with suppress(OSError):  # of a pipe whose reader is gone: who tells it does what it has to, all the same
        os.write(2, f"{text.rstrip()}\n".encode(errors="backslashreplace"))


def open_console() -> None:
    """Replace standard streams that are closed, and make the others take every path.

    A program that is started with a closed stream (``2>&-``) would give its descriptor to the next file it opens, and
    its error messages would end up in that file.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            _occupy(descriptor)
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _occupy(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)
