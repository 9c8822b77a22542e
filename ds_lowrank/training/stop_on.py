"""``--stop-on``: what a user takes for the sign of a run that will not come to anything.

A condition ends the run when it has held for some steps in a row. A loss or a norm above a limit leaves finite weights
that are bad all the same, and nobody has those from before. Therefore no checkpoint is saved from the first of these
steps on: if the run is ended, the newest checkpoint is older than all of them.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_lowrank.training.course import SETTLED, Course

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
LOSS_STEPS = 10
"""So many steps in a row with a loss above the limit, unless a condition says how many: one batch may be an outlier."""
MOST_STEPS = 2**31 - 1


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        kind: ``nan``, ``loss`` or ``grad-norm``.
        steps: for how many steps in a row it has to hold.
        limit: that a loss, or a gradient norm over its moving average, is not to exceed; unused for ``nan``.
        text: as the user wrote it.
    """

    kind: str
    steps: int
    limit: float
    text: str

    def __str__(self) -> str:
        """As the user wrote it."""
        return self.text


def condition(text: str) -> Condition:
    """Argument type: ``nan:K``, ``loss:X``, ``loss:X:M``, ``grad-norm:X`` or ``grad-norm:X:M``.

    Args:
        text: of the command line.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    kind, _, rest = text.partition(":")
    if kind == "nan" and (found := re.fullmatch(r"(\d{1,10})", rest, re.ASCII)):
        return Condition(kind, _steps(text, found[1]), math.nan, text)
    if kind in ("loss", "grad-norm") and (found := re.fullmatch(rf"({NUMBER})(?::(\d{{1,10}}))?", rest, re.ASCII)):
        limit, least = float(found[1]), 1.0 if kind == "grad-norm" else 0.0
        if not least < limit < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: the limit is not a finite number above {least:g}")
        usual = LOSS_STEPS if kind == "loss" else 1
        return Condition(kind, usual if found[2] is None else _steps(text, found[2]), limit, text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is no condition: give nan:K (K steps without a finite loss or gradient), loss:X or loss:X:M (a loss "
        "above X in M steps in a row), grad-norm:X or grad-norm:X:M (a gradient norm above X times its moving average)"
    )


def _steps(text: str, steps: str) -> int:
    if not 1 <= int(steps) <= MOST_STEPS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: the number of steps is not a whole number of at least 1 and at most {MOST_STEPS}"
        )
    return int(steps)


class OneOfEachKind(argparse.Action):
    """Collects conditions, also those of a repeated flag, and refuses two of one kind."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Add the conditions of one occurrence of the flag."""
        found = [*(getattr(namespace, self.dest) or ()), *values]
        kinds = [each.kind for each in found]
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            given = " and ".join(str(each) for each in found if each.kind == twice)
            raise argparse.ArgumentError(self, f"{given} are two conditions of one kind: give one of them")
        setattr(namespace, self.dest, found)


class Limits:
    """Watches the losses and gradient norms of a run for what ``--stop-on`` says of them.

    Args:
        conditions: of the command line.
        course: of the run; what it says is of the steps before the one that is noted.
        step: the step after which the run starts or resumes.
    """

    def __init__(self, conditions: Sequence[Condition], course: Course, step: int) -> None:
        self._of = {each.kind: each for each in conditions}
        self._course = course
        self._norm_ratio: float | None = None
        self._within = dict.fromkeys(("loss", "grad-norm"), step)  # the last step in which each did not hold

    def is_beyond(self, norm_ratio: float | None) -> bool:
        """Whether this rank sees a gradient norm beyond its limit: a flag on which the ranks agree.

        Args:
            norm_ratio: the norm over its moving average; None if one of them is not known.
        """
        self._norm_ratio, found = norm_ratio, self._of.get("grad-norm")
        if found is None or norm_ratio is None or self._course.norms <= SETTLED:
            return False
        return norm_ratio > found.limit

    def note(self, step: int, loss: float, norm_is_beyond: bool) -> str | None:
        """Note a step.

        Args:
            step: its number.
            loss: mean over micro-batches and ranks.
            norm_is_beyond: whether :meth:`is_beyond` on any rank.

        Returns:
            Which condition ends the run, and with which numbers; None if none does.
        """
        limit, lowest = self._of["loss"].limit if "loss" in self._of else math.inf, self._course.lowest_loss
        # A loss that starts above the limit has to come below it first. NaN within a series does not end it.
        beyond = {"loss": lowest <= limit and not loss <= limit, "grad-norm": norm_is_beyond}
        self._course.add_loss(loss)
        for kind, holds in beyond.items():
            if kind not in self._of or not holds:
                self._within[kind] = step
        for kind, last in self._within.items():
            if (found := self._of.get(kind)) is not None and step - last >= found.steps:
                what, now = "gradient norm over its moving average", f"{self._norm_ratio or math.nan:.4g}"
                if kind == "loss":
                    what, now = "loss", f"{loss:.4g}, after a lowest loss of {lowest:.4g}"
                return (
                    f"--stop-on {found}: the {what} has been above {found.limit:g} since step {last + 1}, and is {now}"
                )
        return None

    def is_quiet(self, step: int) -> bool:
        """Whether no condition has held since a step, or in it.

        Args:
            step: its number.
        """
        return all(last >= step for last in self._within.values())
