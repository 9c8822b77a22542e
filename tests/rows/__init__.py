"""How the tests run every method: one file a method, with its ``NAME`` and its ``ROW``."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tests.rows.row import Row

ROWS: dict[str, Row] = {}
"""The row of every method by its name in ``optimizer.type``."""

for _module in sorted(iter_modules(__path__), key=lambda module: module.name):
    _found = import_module(f"{__name__}.{_module.name}")
    if hasattr(_found, "ROW"):
        ROWS[_found.NAME] = _found.ROW
