"""The tasks that are made of the standard library's source: balanced, without a leak, the same in every call."""

import ast
import json
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from ds_lowrank.data import halves, library, parameters
from ds_lowrank.data.built_in import BUILT_IN
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.library import outermost_functions, undocumented
from ds_lowrank.data.rows import open_rows

BY_FILE = [name for name, task in BUILT_IN.items() if task.held_out_by == "file"]
MODULE = '''
def first(one, *, two=None):
    """What it does."""
    def inner():
        "Inside."
        return one
    x = inner()  # a comment
    y = two
    return x + y

class A:
    """A class."""
    async def second(self):
        """Only this."""
'''


@cache
def rows_of(name):
    return BUILT_IN[name].rows()


@pytest.fixture(scope="module", params=BY_FILE)
def task(request):
    """The name of a task, its rows, and both splits."""
    rows = rows_of(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILT_IN, request.param, replace(BUILT_IN[request.param], rows=lambda: rows))
        found = open_rows(request.param, None, 0.1, 0)
        assert open_rows(request.param, None, 0.5, 1) == found  # neither seed nor share move a row
    return request.param, rows, found.train, found.validation[""]


def text_of(row):
    return "\n".join(sorted(row[column] for column in ("first", "second", "text") if column in row))


def test_both_splits_have_as_many_rows_of_each_class(task):
    _, rows, train, validation = task
    assert len(train) + len(validation) == len(rows)
    assert len(train) > 1600 and 0.15 < len(validation) / len(rows) < 0.25
    for part in (train, validation):
        assert len(set(Counter(row["label"] for row in part).values())) == 1


def test_no_file_and_no_body_is_in_both_splits(task):
    _, rows, train, validation = task
    assert not {row["file"] for row in train} & {row["file"] for row in validation}
    assert len(set(map(text_of, rows))) == len(rows)


@pytest.mark.slow
def test_a_second_call_gives_the_same_bytes(task):
    name, rows, _, _ = task
    assert json.dumps(BUILT_IN[name].rows()) == json.dumps(rows)


def test_half_of_the_pairs_of_every_package_are_swapped():
    rows = rows_of("stdlib-order")
    by_package = {}
    for row in rows:
        by_package.setdefault(row["file"].partition("/")[0], []).append(row["label"])
    for labels in by_package.values():
        assert 2 * labels.count(halves.SWAPPED) == len(labels) <= 2 * halves.PAIRS  # the most of each split
    for row in rows:
        first, second = ("first", "second") if row["label"] == halves.IN_ORDER else ("second", "first")
        sizes = [len(ast.parse(row[half]).body) for half in (first, second)]
        assert sum(sizes) >= halves.STATEMENTS and abs(sizes[1] - sizes[0]) <= 1


@pytest.mark.parametrize("size", [len, lambda text: text.count("\n"), lambda text: len(ast.parse(text).body)])
def test_the_length_of_the_halves_says_little(size):
    right = 0.0
    for row in rows_of("stdlib-order"):
        first, second = size(row["first"]), size(row["second"])
        right += 0.5 if first == second else (first < second) == (row["label"] == halves.IN_ORDER)
    assert abs(right / len(rows_of("stdlib-order")) - 0.5) < 0.1


def test_docstrings_and_comments_are_not_shown():
    first, second = (undocumented(node, "package/module.py") for node in outermost_functions(MODULE))
    assert first.statements == ("def inner():\n    return one", "x = inner()", "y = two", "return x + y")
    assert first.returns and first.package == "package"
    assert second.statements == ("pass",) and not second.returns


@pytest.mark.parametrize(
    ("signature", "count"), [("", 0), ("self", 1), ("a, /, b, *, c", 3), ("*a, **b", 2), ("a=(1, 2), *, b: int = 3", 2)]
)
def test_parameters_of_all_kinds_count(signature, count):
    (function,) = ast.parse(f"def f({signature}): pass").body
    assert parameters.number_of_parameters(function.args) == count


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_python_without_sources_is_named(name, monkeypatch, tmp_path):
    (tmp_path / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(library.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="without the sources of its standard library: give a file of your own"):
        open_rows(name, None, 0.1, 0)


def test_a_misspelt_name_is_answered_with_those_that_there_are():
    with pytest.raises(DataError, match="'stdlib-functions', 'stdlib-order', 'stdlib-parameters', 'glue:TASK' or"):
        open_rows("stdlib-ordr", None, 0.1, 0)
