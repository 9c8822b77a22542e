"""The programs that the image starts, as modules."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.unit.pages import ROOT

FOLDER = ROOT / "launch/container"
ENTRYPOINT = FOLDER / "entrypoint"


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"container_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
