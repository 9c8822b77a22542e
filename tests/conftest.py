"""``--quick``: the selection of ``make quick``, which leaves out slow tests and all rank counts except one."""

from __future__ import annotations

from collections import defaultdict

import pytest

SLOW = {
    "test_python_runs",
    "test_int8_moments_are_equal_on_every_world",
    "test_an_average_that_moves_less_than_a_code_a_step_still_arrives",
}
"""Tests of several seconds that carry no ``slow`` marker, by function name."""
RANKS = {"ranks": 2, "tensor": 2, "data": 3}
"""For each parameter that counts ranks, the value that ``--quick`` keeps; the smallest one where a test lacks it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out slow tests and all rank counts except one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    counts = defaultdict(set)
    for item in items:
        for name, value in rank_counts(item).items():
            counts[function_of(item), name].add(value)

    def is_kept(item: pytest.Item) -> bool:
        if item.get_closest_marker("slow") or item.originalname in SLOW:
            return False
        for name, value in rank_counts(item).items():
            values = counts[function_of(item), name]
            if value != (RANKS[name] if RANKS[name] in values else min(values)):
                return False
        return True

    config.hook.pytest_deselected(items=[item for item in items if not is_kept(item)])
    items[:] = [item for item in items if is_kept(item)]


def rank_counts(item: pytest.Item) -> dict[str, int]:
    """The parameters of a test that count ranks."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return {name: value for name, value in parameters.items() if name in RANKS and isinstance(value, int)}


def function_of(item: pytest.Item) -> str:
    """A test's node id without its parameters."""
    return item.nodeid.partition("[")[0]
