"""A task of pairs that needs no download: do two halves of a function's body come in the right order?

A body is the statements of an outermost function of the standard library, without docstrings, and without a ``return``
at the end, which would give the order away. Bodies with fewer than ``STATEMENTS`` statements or more than ``LONGEST``
characters are skipped, and a body that occurs several times counts once, for the first path in sorted order. The middle
one of an odd number of statements is in either half, equally often, so that their lengths do not give the order away.

Of every package, and in it of the files to train on and of those held out, half of the pairs are swapped, at most
``PAIRS`` pairs in all.
"""

from __future__ import annotations

from ds_lowrank.data.library import Function, library_functions, without_sources
from ds_lowrank.data.split import Split, split_key

STATEMENTS = 3
LONGEST = 400
PAIRS = 80
IN_ORDER, SWAPPED = "in order", "swapped"


def halves_of_functions() -> list[dict[str, str]]:
    """One row per function, the same rows in every call on one version of Python.

    Returns:
        Rows with the columns ``first`` and ``second`` (source code), ``label`` (``in order`` or ``swapped``) and
        ``file``.

    Raises:
        DataError: the interpreter comes without the sources of its standard library.
    """
    by_group: dict[tuple[str, Split], list[tuple[str, str, str]]] = {}
    seen: set[tuple[str, ...]] = set()
    for function in library_functions():
        statements = function.statements[:-1] if function.returns else function.statements
        if statements not in seen and _is_wanted(statements):
            seen.add(statements)
            by_group.setdefault((function.package, function.split), []).append(_halves(function, statements))
    if not by_group:
        raise without_sources()
    return [row for group in sorted(by_group) for row in _half_of_them_swapped(by_group[group])]


def _is_wanted(statements: tuple[str, ...]) -> bool:
    short, middle = len("\n".join(statements)) <= LONGEST, len(statements) // 2
    return short and len(statements) >= STATEMENTS and statements[:middle] != statements[middle:]


def _halves(function: Function, statements: tuple[str, ...]) -> tuple[str, str, str]:
    middle = (len(statements) + split_key("\n".join(statements)) % 2) // 2  # the hash is as good as a coin
    return "\n".join(statements[:middle]), "\n".join(statements[middle:]), function.file


def _half_of_them_swapped(bodies: list[tuple[str, str, str]]) -> list[dict[str, str]]:
    # The order of the hashes is as good as random. Of an odd number one is left out: both labels are equally frequent.
    chosen = sorted(bodies, key=lambda body: split_key("\n".join(body[:2])))[: min(PAIRS, len(bodies) // 2 * 2)]
    rows = []
    for number, (first, second, file) in enumerate(chosen):
        if number % 2:
            rows.append({"first": second, "second": first, "label": SWAPPED, "file": file})
        else:
            rows.append({"first": first, "second": second, "label": IN_ORDER, "file": file})
    return rows
