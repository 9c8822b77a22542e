"""What the labels of a column are: classes with names, or numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_lowrank.data.errors import DataError


@dataclass(frozen=True)
class Labels:
    """`classes`: the names, in the order of their numbers, and none where the labels are numbers to be predicted.

    numbers: the class of each value that the column holds.
    """

    classes: tuple[str, ...]
    numbers: Mapping[Any, int]

    @property
    def regression(self) -> bool:
        return not self.classes

    def number(self, value: Any, where: str) -> int | float:
        """The class of a label, or its value. Raises DataError, saying `where`, for one that training has not got."""
        if self.regression:
            return _float(value, where)
        value = _typed(value)
        if not isinstance(value, str | int) or value not in self.numbers:
            known = ", ".join(map(str, list(self.numbers)[:8]))
            raise DataError(f"{where}: label {value!r} is none of the classes in training ({known}, ...)")
        return self.numbers[value]


def labels_of(values: Sequence[Any], names: Sequence[str] | None, what: str) -> Labels:
    """Classes where all values are text, or all whole numbers, in their order; regression where they are other numbers.

    values: of the training rows. names: of whole-numbered classes, where the data say them. what: for messages.

    Raises DataError for a label that is missing, for mixed kinds, and for a single class.
    """
    typed = [_typed(value) for value in values]
    missing = [row for row, value in enumerate(typed) if value is None or value == ""]
    if missing:
        raise DataError(f"{what} has no label in {len(missing)} rows, first in row {missing[0]}; remove these rows")
    if names is not None:
        return Labels(tuple(names), {number: number for number in range(len(names))})
    kinds = {type(value) for value in typed}
    if kinds <= {int, float} and float in kinds:
        return Labels((), {})
    if len(kinds) > 1 or not kinds <= {int, str}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"{what} mixes kinds of labels ({found}): give text, or whole numbers, or numbers")
    distinct = sorted(set(typed))
    if len(distinct) < 2:
        raise DataError(f"{what} has the one class {distinct[0]!r}: nothing can be learnt from it")
    return Labels(tuple(map(str, distinct)), {value: number for number, value in enumerate(distinct)})


def _typed(value: Any) -> Any:
    """A number for text that spells one, as everything in a CSV file is text; yes and no become text."""
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
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: label {value!r} is no number, and those in training are") from None
