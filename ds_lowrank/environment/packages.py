from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util


def is_importable(module: str) -> bool:
    """Whether there is a module of that name, which may have dots; of those only what lies before the last is run."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def version_of(distribution: str) -> str:
    """As installed; empty where there is no such metadata."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def one_line(error: Exception) -> str:
    """An error as part of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
