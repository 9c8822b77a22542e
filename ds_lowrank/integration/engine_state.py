"""What an engine keeps besides weights and the optimizer's state: counters, the scheduler's state, the loss scale."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

Schedule = Literal["restore", "advance", "leave"]
"""What becomes of a scheduler: its state is restored, it goes to the saved step with its own rates, or nothing."""

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


def load_engine_state(engine: Any, saved: Mapping[str, Any], schedule: Schedule) -> None:
    """Restore the state.

    Args:
        engine: an engine just built.
        saved: what :func:`engine_state` returned.
        schedule: what becomes of the scheduler.
    """
    for name, value in saved["counters"].items():
        setattr(engine, name, value)
    scheduler = engine.lr_scheduler
    if scheduler is not None and saved["scheduler"] is not None and schedule == "restore":
        scheduler.load_state_dict(saved["scheduler"])
    elif scheduler is not None and schedule == "advance":
        with warnings.catch_warnings(action="ignore"):  # that the optimizer has made no steps
            for _ in range(engine.global_steps - engine.skipped_steps):
                scheduler.step()
    scaler = _scaler(engine.optimizer)
    for key, value in saved["loss_scale"].items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _scaler(wrapper: Any) -> Any:
    """What keeps the loss scale: FP16_UnfusedOptimizer's configuration of it, or ZeRO's ``loss_scaler``."""
    return getattr(wrapper, "loss_scale_config", None) or getattr(wrapper, "loss_scaler", None)
