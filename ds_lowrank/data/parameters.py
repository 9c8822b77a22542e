"""A task about structure that needs no download: how many parameters has a function of which only the body is shown?

The parameters are the names that the body uses and neither sets, imports nor finds in its module: no single word tells
their number. All kinds of parameters count, ``self`` and ``*rest`` too. A body is that of an outermost function of the
standard library, without docstrings. Bodies of fewer than ``LINES`` lines or more than ``LONGEST`` characters, and
functions without parameters, which are few, are skipped. A body that occurs several times counts once, for the first
path in sorted order.
"""

from __future__ import annotations

import ast

from ds_lowrank.data.library import library_functions, without_sources
from ds_lowrank.data.split import Split, split_key

LINES = 3
LONGEST = 400
CLASSES = ("one", "two", "three or more")
FUNCTIONS: dict[Split, int] = {"train": 700, "validation": 190}
"""The most functions of each class."""


def parameters_of_functions() -> list[dict[str, str]]:
    """One row per function, the same rows in every call on one version of Python.

    Returns:
        Rows with the columns ``text`` (source code), ``label`` (one of ``CLASSES``) and ``file``. In both splits all
        classes have the same number of rows.

    Raises:
        DataError: the interpreter comes without the sources of its standard library.
    """
    found: dict[Split, dict[str, list[dict[str, str]]]] = {
        split: {label: [] for label in CLASSES} for split in FUNCTIONS
    }
    seen: set[str] = set()
    for function in library_functions():
        text, count = "\n".join(function.statements), number_of_parameters(function.arguments)
        if count and text not in seen and len(text) <= LONGEST and text.count("\n") + 1 >= LINES:
            seen.add(text)
            label = CLASSES[min(count, len(CLASSES)) - 1]
            found[function.split][label].append({"text": text, "label": label, "file": function.file})
    if not seen:
        raise without_sources()
    return [row for split, most in FUNCTIONS.items() for row in _balanced(found[split], most)]


def number_of_parameters(arguments: ast.arguments) -> int:
    """The number of a function's parameters, of all kinds."""
    several = [arguments.posonlyargs, arguments.args, arguments.kwonlyargs]
    return sum(map(len, several)) + sum(one is not None for one in (arguments.vararg, arguments.kwarg))


def _balanced(by_label: dict[str, list[dict[str, str]]], most: int) -> list[dict[str, str]]:
    """As many rows of each label as the rarest one has, and at most ``most``, in an order as good as random."""
    count = min(most, *map(len, by_label.values()))
    return [row for label in CLASSES for row in sorted(by_label[label], key=lambda row: split_key(row["text"]))[:count]]
