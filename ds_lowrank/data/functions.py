"""Functions of Python's standard library, each labelled with the package it comes from: a task that needs no download.

Of the top-level packages the CLASSES with most functions take part, each with at most FUNCTIONS of them. A function is
its source from `def` to its end, without the decorators and with the indentation of its own taken off. Functions inside
functions, and those of fewer than LINES lines, do not count by themselves, and packages of tests are left out. A source
that stands in several places counts once, at the first, in the order of paths.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.files import read_text
from ds_lowrank.data.sources import files_below
from ds_lowrank.data.split import split_key

CLASSES = 10
FUNCTIONS = 240
LINES = 4
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


def standard_library_functions() -> list[dict[str, str]]:
    """One row a function, with the columns `text` and `label`, the same for every call on one version of Python.

    Raises DataError where the interpreter has no standard library in source.
    """
    by_package = _functions_of_packages(Path(sysconfig.get_path("stdlib")))
    largest = sorted(by_package, key=lambda package: (-len(by_package[package]), package))[:CLASSES]
    if len(largest) < 2:
        raise DataError("this Python has no standard library in source: give --data a file of your own")
    # The order of hashes is as good as a random one, and stays when the library gets a function more.
    return [
        {"text": source, "label": package}
        for package in sorted(largest)
        for source in sorted(by_package[package], key=split_key)[:FUNCTIONS]
    ]


def _functions_of_packages(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for path in files_below(root, lambda name: name in LEFT_OUT, suffix=".py"):
        package, *inside = path.relative_to(root).parts
        if not inside:
            continue
        for source in functions_in(_text_or_nothing(path)):
            if source not in seen:
                seen.add(source)
                found.setdefault(package, []).append(source)
    return found


def functions_in(text: str) -> Iterator[str]:
    """The source of every function and method in a module, outermost ones only; nothing for what does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            module = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for function in _outermost(module):
        assert function.end_lineno is not None
        if function.end_lineno - function.lineno + 1 >= LINES:
            own = lines[function.lineno - 1 : function.end_lineno]
            # Not textwrap.dedent: a text of several lines inside may reach further to the left.
            indentation = own[0][: -len(own[0].lstrip())]
            yield "".join(line.removeprefix(indentation) for line in own).rstrip()


def _outermost(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outermost(child)


def _text_or_nothing(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError:
        return ""
