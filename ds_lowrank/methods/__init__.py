"""One paper a file. A class here with a ``name`` is found by it; nothing else has to know of a new method."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules

from ds_lowrank.methods.base import Method


def _found() -> dict[str, type[Method]]:
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    classes = [member for module in modules for _, member in inspect.getmembers(module, inspect.isclass)]
    return {one.name: one for one in classes if issubclass(one, Method) and "name" in vars(one)}


METHODS: dict[str, type[Method]] = dict(sorted(_found().items()))
"""Every method by the name it has in ``optimizer.type``."""
