"""A classification task that needs no download: functions of Python's standard library, labelled by package.

The ``CLASSES`` top-level packages with the most functions are the classes, each with at most ``FUNCTIONS`` examples. A
function is its source from ``def`` to the end, dedented and without decorators. Nested functions, functions shorter
than ``LINES`` lines and test packages are skipped. Source code that occurs in several files counts once, for the first
path in sorted order.
"""

from __future__ import annotations

from collections.abc import Iterator

from ds_lowrank.data.library import library_files, outermost_functions, without_sources
from ds_lowrank.data.split import split_key

CLASSES = 10
FUNCTIONS = 240
LINES = 4


def standard_library_functions() -> list[dict[str, str]]:
    """One row per function, the same rows in every call on one version of Python.

    Returns:
        Rows with the columns ``text`` (source code) and ``label`` (package).

    Raises:
        DataError: the interpreter comes without the sources of its standard library.
    """
    by_package = _functions_of_packages()
    largest = sorted(by_package, key=lambda package: (-len(by_package[package]), package))[:CLASSES]
    if len(largest) < 2:
        raise without_sources()
    # The order of the hashes is as good as random, and does not change when the library gains a function.
    return [
        {"text": source, "label": package}
        for package in sorted(largest)
        for source in sorted(by_package[package], key=split_key)[:FUNCTIONS]
    ]


def _functions_of_packages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for path, text in library_files():
        package, *inside = path.parts
        if not inside:
            continue
        for source in functions_in(text):
            if source not in seen:
                seen.add(source)
                found.setdefault(package, []).append(source)
    return found


def functions_in(text: str) -> Iterator[str]:
    """Iterate over the sources of the outermost functions and methods of a module.

    Args:
        text: the source of the module. If it does not parse, there are no functions.
    """
    lines = text.splitlines(keepends=True)
    for function in outermost_functions(text):
        assert function.end_lineno is not None
        if function.end_lineno - function.lineno + 1 >= LINES:
            own = lines[function.lineno - 1 : function.end_lineno]
            # Not textwrap.dedent: a multi-line string inside may be indented less than the function.
            indentation = own[0][: -len(own[0].lstrip())]
            yield "".join(line.removeprefix(indentation) for line in own).rstrip()
