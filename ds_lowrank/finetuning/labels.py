"""The labels of a column: named classes, or numbers to predict."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.records import Row

LARGEST = 3.4e38  # of fp32, in which losses are computed


@dataclass(frozen=True)
class Labels:
    """What the labels of a column mean.

    Attributes:
        classes: the names of the classes, in the order of their numbers; empty if the labels are numbers to predict.
        numbers: the number of the class, keyed by the value in the column.
    """

    classes: tuple[str, ...]
    numbers: Mapping[Any, int]

    @property
    def regression(self) -> bool:
        """Whether the labels are numbers to predict."""
        return not self.classes

    def number(self, value: Any, where: str) -> int | float:
        """The number of a label's class or, for regression, its value.

        Args:
            value: the value in the column.
            where: names the row in error messages.

        Raises:
            DataError: the class does not occur in the training rows, or the value is not a number.
        """
        if self.regression:
            return _float(value, where)
        value = _typed(value)
        if not isinstance(value, str | int) or value not in self.numbers:
            known = ", ".join(map(str, list(self.numbers)[:8]))
            raise DataError(
                f"{where}: label {reprlib.repr(value)} is not among the classes of the training rows ({known}, ...)"
            )
        return self.numbers[value]


def labels_of(rows: Sequence[Row], column: str, names: Sequence[str] | None) -> Labels:
    """Find out whether labels are classes (all strings or all integers, sorted) or numbers to predict.

    Args:
        rows: the training rows.
        column: the column of the labels.
        names: the names of integer classes, if the data set provides them.

    Raises:
        DataError: a label is missing or not finite, the labels are of different kinds, or there is only one class.
    """
    typed = [_typed(row[column]) for row in rows]
    what = f"column {column!r}"
    missing = [number for number, value in enumerate(typed) if value is None or value == ""]
    if missing:
        first = rows[missing[0]].where
        raise DataError(f"{what} has no label in {len(missing)} rows, first in {first}; remove these rows")
    if names is not None:
        return Labels(tuple(names), {number: number for number in range(len(names))})
    kinds = {type(value) for value in typed}
    if kinds <= {int, float} and float in kinds:
        for row, value in zip(rows, typed, strict=True):
            _float(value, row.where)
        return Labels((), {})
    if len(kinds) > 1 or not kinds <= {int, str}:
        firsts = {type(value).__name__: row.where for row, value in zip(reversed(rows), reversed(typed), strict=True)}
        found = ", ".join(f"{kind} in {where}" for kind, where in sorted(firsts.items()))
        raise DataError(f"{what} mixes kinds of labels ({found}): give text, or whole numbers, or numbers")
    distinct = sorted(set(typed))
    if len(distinct) < 2:
        raise DataError(f"{what} has only one class, {distinct[0]!r}, from {rows[0].where} on: give two or more")
    return Labels(tuple(map(str, distinct)), {value: number for number, value in enumerate(distinct)})


def _typed(value: Any) -> Any:
    """Convert strings of numbers to numbers, as all values in a CSV file are strings, and booleans to strings."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _float(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: label {reprlib.repr(value)} is not a number, but those of the training rows are"
        ) from None
    except OverflowError:
        number = math.inf
    if not abs(number) < LARGEST:
        raise DataError(f"{where}: label {reprlib.repr(value)} is not finite in fp32; correct or remove the row")
    return number
