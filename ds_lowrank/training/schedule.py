"""Learning-rate schedules for configurations without a scheduler: linear warm-up, then cosine or linear decay."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

FLOOR = 0.1


def warmup_steps(warmup: float, steps: int) -> int:
    """The number of warm-up steps.

    Args:
        warmup: a fraction of the steps if below 1, else their number.
        steps: the run's total number of steps.

    Raises:
        ValueError: ``warmup`` is negative, not a whole number, or above ``steps``.
    """
    count = round(warmup * steps) if warmup < 1 else int(warmup)
    if warmup < 0 or (warmup >= 1 and count != warmup):
        raise ValueError(f"--warmup {warmup:g} must be a fraction below 1 or a whole number of steps")
    if count > steps:
        raise ValueError(f"--warmup of {count} steps is longer than the run of {steps} steps")
    return count


def warmup_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """Linear warm-up, then cosine decay to ``FLOOR``.

    Args:
        steps: the run's total number of steps.
        warmup: the number of warm-up steps.

    Returns:
        The factor on the base learning rate at step t, counted from 0. It rises as (t + 1) / warmup to 1 at step
        warmup - 1, then follows half a cosine down to ``FLOOR`` at step steps - 1, and stays there.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step + 1 - warmup) / max(1, steps - warmup))
        return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def warmup_linear(steps: int, warmup: int) -> Callable[[int], float]:
    """Linear warm-up, then linear decay to 0.

    Args:
        steps: the run's total number of steps.
        warmup: the number of warm-up steps.

    Returns:
        The factor on the base learning rate at step t, counted from 0. It rises as (t + 1) / warmup to 1 at step
        warmup - 1, then falls linearly from 1 at step warmup to 0 at step steps, which is after the last step.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (steps - step) / max(1, steps - warmup))

    return factor


SCHEDULES = {"cosine": warmup_cosine, "linear": warmup_linear}


def scheduler_factory(steps: int, warmup: int, schedule: str = "cosine") -> Callable[[Optimizer], LambdaLR]:
    """Make the ``lr_scheduler`` argument of ``ds_lowrank.initialize``.

    Args:
        steps: the run's total number of steps.
        warmup: the number of warm-up steps.
        schedule: a key of ``SCHEDULES``.

    Returns:
        A function from an optimizer to its scheduler, which multiplies every group's base learning rate by the same
        factor.
    """
    return lambda optimizer: LambdaLR(optimizer, SCHEDULES[schedule](steps, warmup))
