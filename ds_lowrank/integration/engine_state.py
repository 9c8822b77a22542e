"""What an engine keeps besides weights and the optimizer's state: counters, the scheduler's state, the loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's dynamic loss scalers that a step changes."""


def engine_state(engine: Any) -> dict[str, Any]:
    """The state, in plain values.

    Args:
        engine: any engine of DeepSpeed's.
    """
    scaler, scheduler = _scaler(engine.optimizer), engine.lr_scheduler
    return {
        "counters": {name: int(getattr(engine, name)) for name in COUNTERS},
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "loss_scale": {key: getattr(scaler, key) for key in SCALE if hasattr(scaler, key)},
    }


def load_engine_state(engine: Any, saved: Mapping[str, Any], *, with_scheduler: bool, with_scale: bool) -> None:
    """Restore the state.

    Args:
        engine: an engine just built.
        saved: what :func:`engine_state` returned.
        with_scheduler: whether the scheduler's state is restored.
        with_scale: whether the loss scale is.
    """
    for name, value in saved["counters"].items():
        setattr(engine, name, value)
    if with_scheduler and engine.lr_scheduler is not None and saved["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(saved["scheduler"])
    scaler = _scaler(engine.optimizer)
    for key, value in saved["loss_scale"].items() if with_scale else ():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _scaler(wrapper: Any) -> Any:
    """What keeps the loss scale: FP16_UnfusedOptimizer's configuration of it, or ZeRO's ``loss_scaler``."""
    return getattr(wrapper, "loss_scale_config", None) or getattr(wrapper, "loss_scaler", None)
