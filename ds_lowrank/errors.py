"""The package's errors. Every message says what is wrong and what to change."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that the package cannot run. Raised at the start, on every rank."""


class CheckpointError(ValueError):
    """A checkpoint or state dict that cannot be written, read, or loaded into this optimizer, model or layout."""


MISSES_SHARDS = (
    "bf16 with tensor parallelism at ZeRO 0: DeepSpeed 0.19.8 leaves the shards of all tensor-parallel ranks but the "
    "first out of the gradient norm. Set zero_optimization.stage to 1"
)
"""Raised where the configuration is checked, and where the optimizer sees a wrapper that no configuration announced."""
