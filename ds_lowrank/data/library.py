"""The functions of Python's standard library, of which the built-in fine-tuning tasks are made."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ds_lowrank.data.errors import DataError, NotTextError
from ds_lowrank.data.files import files_below
from ds_lowrank.data.split import Split, split_of
from ds_lowrank.data.text import read_text

HELD_OUT = 0.2
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Function:
    """A function without what names or describes it.

    Attributes:
        file: the path of its file below the library's folder, with slashes.
        arguments: its parameters.
        statements: the source of each statement of its body, as ``ast.unparse`` writes it: without docstrings, those of
            nested functions included, and without comments.
        returns: whether the last statement is a ``return``.
    """

    file: str
    arguments: ast.arguments
    statements: tuple[str, ...]
    returns: bool

    @property
    def package(self) -> str:
        """The top-level package, or the file of a module that is in none."""
        return self.file.partition("/")[0]

    @property
    def split(self) -> Split:
        """``train`` or ``validation``: all functions of a file are in the same."""
        return split_of(self.file, HELD_OUT)


def library_files() -> Iterator[tuple[Path, str]]:
    """Iterate over the files of the standard library in sorted order, without tests and installed packages.

    Returns:
        Pairs of a path, relative to the library's folder, and a text. Files that are not text are skipped.

    Raises:
        DataError: there are no such files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in files_below(root, lambda name: name in LEFT_OUT, suffix=".py"):
        try:
            text = read_text(path)
        except NotTextError:
            continue
        yield path.relative_to(root), text


def library_functions() -> Iterator[Function]:
    """Iterate over the outermost functions of the standard library, file by file.

    Raises:
        DataError: there are no files.
    """
    for path, text in library_files():
        for node in outermost_functions(text):
            yield undocumented(node, path.as_posix())


def undocumented(node: ast.FunctionDef | ast.AsyncFunctionDef, file: str) -> Function:
    """Return a function without its docstrings, which are removed from the node."""
    for inner in ast.walk(node):
        if isinstance(inner, DEFINITIONS) and ast.get_docstring(inner, clean=False) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    returns = bool(node.body) and isinstance(node.body[-1], ast.Return)
    return Function(file, node.args, tuple(map(ast.unparse, node.body)), returns)


def outermost_functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Iterate over the outermost functions and methods of a module.

    Args:
        text: the source of the module. If it does not parse, there are no functions.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            module = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    yield from _outermost(module)


def without_sources() -> DataError:
    """The error of a task that finds no functions."""
    return DataError("this Python comes without the sources of its standard library: give a file of your own as --data")


def _outermost(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outermost(child)
