"""The package's errors. Every message says what is wrong and what to change."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """The package cannot run a configuration. Raised at the start, on every rank."""


class CheckpointError(ValueError):
    """A checkpoint or state dict cannot be written, read, or loaded into this optimizer, model or layout."""


MISSES_SHARDS = (
    "bf16 with tensor parallelism at ZeRO 0: DeepSpeed 0.19.8 counts only the shards of the first tensor-parallel rank "
    "in the gradient norm. Set zero_optimization.stage to 1"
)
"""Raised when the configuration is checked, and when the optimizer finds a wrapper that no configuration announced."""


def closest_name(wrong: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name that a misspelt one most likely stands for; upper and lower case count as equal.

    Args:
        wrong: the name that was given.
        valid: the names that exist.
        cutoff: the least similarity that counts, between 0 and 1.

    Returns:
        The most similar valid name, or None if none is similar enough.
    """
    by_lower_case = {name.lower(): name for name in sorted(valid)}
    found = get_close_matches(wrong.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[found[0]] if found else None
