"""A command line's usage and errors, printed once per job and not once per rank."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed.rendezvous import rendezvous

PATIENCE = timedelta(seconds=20)
"""How long a rank waits for the others before it ends. They start within a few seconds of each other."""


class JobParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and of which only rank 0 prints.

    All ranks parse the same command line, so all of them end here, with the same exit code.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def _print_message(self, message: str, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the process; every rank ends only when rank 0 has printed, as a launcher kills the others at the first.

        Args:
            status: the exit code.
            message: what rank 0 prints to standard error.
        """
        if message:
            self._print_message(message, sys.stderr)
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it is closed
            stream.flush()
        with suppress(Exception):  # the message is printed; if a rank is missing, or is no number, end all the same
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
                _wait_for_all()
        sys.exit(status)


def _wait_for_all() -> None:
    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    store.set(f"usage/{rank}", "ended")
    store.wait([f"usage/{other}" for other in range(world)], PATIENCE)
    if rank == 0:
        time.sleep(0.2)  # rank 0 may hold the store that the others are still reading
