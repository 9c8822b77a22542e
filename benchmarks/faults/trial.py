"""What a trial of a fault is, and how its outcome is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ACCEPTABLE = frozenset({"refused", "same result"})
"""Verdicts with which a fault has been handled: one clear message, or the result of a run without the fault."""


@dataclass(frozen=True)
class Outcome:
    """What a trial ended in.

    Attributes:
        verdict: ``refused`` (one message, no traceback, exit code not 0), ``same result`` (as without the fault), or
            what went wrong: ``other result``, ``accepted``, ``traceback``, ``hang``, ``ran code``, ``files lost``,
            ``cannot go on``.
        detail: the message, or the difference.
    """

    verdict: str
    detail: str = ""

    @property
    def is_acceptable(self) -> bool:
        """Whether the fault has been handled."""
        return self.verdict in ACCEPTABLE


@dataclass(frozen=True)
class Trial:
    """One fault that is tried.

    Attributes:
        name: what is done, unique within its subject.
        run: does it in an empty folder of its own and judges the outcome.
        compact: whether ``make test`` runs it.
    """

    name: str
    run: Callable[[Path], Outcome]
    compact: bool = False
