"""The package's errors. Every message says what is wrong and what to change."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that the package cannot run. Raised at the start, on every rank."""


class CheckpointError(ValueError):
    """A checkpoint or state dict that cannot be written, read, or loaded into this optimizer, model or layout."""
