"""A small set of cases in which every two values of every two axes meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any


def pairwise(axes: dict[str, list[Any]], valid: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Greedy all-pairs: take the case that covers most pairs not yet covered, until no valid case covers a new one."""
    names = list(axes)
    cases = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]
    open_cases = [(case, _pairs(case)) for case in cases if valid(case)]
    missing = set().union(*(pairs for _, pairs in open_cases))
    chosen = []
    while missing:
        case, pairs = max(open_cases, key=lambda entry: len(entry[1] & missing))
        chosen.append(case)
        missing -= pairs
    return chosen


def _pairs(case: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(case.items(), 2))
