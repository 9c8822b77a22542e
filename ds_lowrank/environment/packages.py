"""Small queries about installed packages, and one-line errors for messages about them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util


def is_importable(module: str) -> bool:
    """Whether a module can be found. For a dotted name its parent packages are imported, the module itself is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent of a dotted name does not exist
        return False


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or '' if unknown."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def one_line(error: Exception) -> str:
    """The type and message of an error on a single line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
