"""The fine-tuning tasks that need no download, by the names that ``--data`` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_lowrank.data.functions import standard_library_functions
from ds_lowrank.data.halves import halves_of_functions
from ds_lowrank.data.parameters import parameters_of_functions

FUNCTIONS = "stdlib-functions"


@dataclass(frozen=True)
class BuiltIn:
    """A task whose examples are made of the standard library's source.

    Attributes:
        columns: the text columns, one or two.
        rows: makes the rows of both splits.
        held_out_by: the column that decides, by its hash, which rows are held out; None for the whole row.
    """

    columns: tuple[str, ...]
    rows: Callable[[], Sequence[dict[str, str]]]
    held_out_by: str | None


BUILT_IN = {
    FUNCTIONS: BuiltIn(("text",), standard_library_functions, None),
    "stdlib-order": BuiltIn(("first", "second"), halves_of_functions, "file"),
    "stdlib-parameters": BuiltIn(("text",), parameters_of_functions, "file"),
}
