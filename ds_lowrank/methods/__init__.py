"""The methods: one paper a file.

Importing this package imports every file in it, and a class with a ``name`` registers itself: nothing else has to know
of a new method.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ds_lowrank.methods.base import METHODS

__all__ = ["METHODS"]

for _module in sorted(iter_modules(__path__), key=lambda module: module.name):
    import_module(f"{__name__}.{_module.name}")
