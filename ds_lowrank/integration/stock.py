"""DeepSpeed's own ``initialize``, where ``register`` has put ours in its place, and its list of optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_lowrank.optimizer.registry import OPTIMIZERS

_replaced: dict[str, Callable[..., Any]] = {}


def stock_initialize() -> Callable[..., Any]:
    """DeepSpeed's own ``initialize``, or what another package had put in its place before us."""
    import deepspeed

    found: Callable[..., Any] = _replaced.get("initialize", deepspeed.initialize)
    return found


def replace_initialize(ours: Callable[..., Any]) -> None:
    """Put a function in the place of ``deepspeed.initialize``. Idempotent.

    Args:
        ours: has its signature, and calls :func:`stock_initialize`'s.
    """
    import deepspeed

    if "initialize" not in _replaced:
        _replaced["initialize"] = deepspeed.initialize
        deepspeed.initialize = ours


def allow_under_zero() -> None:
    """Add the optimizers to DeepSpeed's list of what ZeRO may wrap. Idempotent."""
    from deepspeed.runtime.zero import utils

    known = utils.ZERO_SUPPORTED_OPTIMIZERS
    known.extend(optimizer for optimizer in OPTIMIZERS.values() if optimizer not in known)
