"""How long ranks wait for each other: in steps, and where one of them works while the others wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

TIMEOUT = 300.0
"""Default time limit of a collective in a step, and of a process that shows no sign of life, in seconds."""
SETUP_TIMEOUT = 1800.0
"""Default time limit of a collective while one rank may work alone, in seconds."""


class TimeLimits:
    """The time limit of collectives, which is longer where one rank works and the others wait for it.

    It is the longer one at first: a rank tokenizes, downloads or loads weights, and the first step compiles.

    Args:
        timeout: in steps, in seconds.
        setup_timeout: elsewhere, in seconds; ``timeout`` if that is longer.

    Attributes:
        timeout: the limit in steps, in seconds.
        setup_timeout: the limit elsewhere, in seconds; at least ``timeout``.
        short: whether the limit is now that of steps.
    """

    def __init__(self, timeout: float = TIMEOUT, setup_timeout: float = SETUP_TIMEOUT) -> None:
        self.timeout, self.setup_timeout = timeout, max(timeout, setup_timeout)
        self.short = False

    def __str__(self) -> str:
        """The limit that holds now, with its flag."""
        return f"--timeout {self.timeout:g} s" if self.short else f"--setup-timeout {self.setup_timeout:g} s"

    def shorten(self) -> None:
        """Give collectives the limit of steps from now on."""
        self.short = True
        limit_collectives(self.timeout)

    def lengthen(self) -> None:
        """Give collectives the longer limit from now on, also those of groups that were made with another."""
        self.short = False
        limit_collectives(self.setup_timeout)

    @contextmanager
    def longer(self) -> Iterator[None]:
        """Give collectives the longer limit within a ``with`` statement."""
        before = self.short
        self.lengthen()
        yield  # after an error, the longer limit is still the one that held
        if before:
            self.shorten()


def limit_later_groups(timeout: float) -> None:
    """Give groups that are made without a time limit, as DeepSpeed makes them, this one instead of torch's own.

    It also ends the wait for a rank that is gone when a group is made, of which no connection tells.

    Args:
        timeout: in seconds.
    """
    distributed_c10d.default_pg_timeout = timedelta(seconds=timeout)
    setattr(distributed_c10d, "default_pg_nccl_timeout", timedelta(seconds=timeout))  # noqa: B010  # not exported


def limit_collectives(timeout: float) -> None:
    """Give every process group this time limit, also those that were made with another one.

    Args:
        timeout: in seconds.
    """
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(seconds=timeout), group)
