"""The learning-rate schedules used when the DeepSpeed configuration names none: linear warm-up, then down."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

FLOOR = 0.1


def warmup_steps(warmup: float, steps: int) -> int:
    """`warmup` below 1 is a fraction of `steps`, otherwise a number of them; raises ValueError above `steps`."""
    count = round(warmup * steps) if warmup < 1 else int(warmup)
    if warmup < 0 or (warmup >= 1 and count != warmup):
        raise ValueError(f"--warmup {warmup:g} must be a fraction below 1 or a whole number of steps")
    if count > steps:
        raise ValueError(f"--warmup of {count} steps is longer than the run of {steps} steps")
    return count


def warmup_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """The factor on a group's base learning rate at step t, counted from 0.

    It rises as (t + 1) / warmup, is 1 at step warmup - 1, follows half a cosine from there, is FLOOR at step steps - 1
    and stays at FLOOR.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step + 1 - warmup) / max(1, steps - warmup))
        return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def warmup_linear(steps: int, warmup: int) -> Callable[[int], float]:
    """The same warm-up, then a straight line from 1 at step `warmup` to 0 at step `steps`, after the last one."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (steps - step) / max(1, steps - warmup))

    return factor


SCHEDULES = {"cosine": warmup_cosine, "linear": warmup_linear}


def scheduler_factory(steps: int, warmup: int, schedule: str = "cosine") -> Callable[[Optimizer], LambdaLR]:
    """What `initialize` takes as `lr_scheduler`: every group keeps its own base learning rate under the same factor."""
    return lambda optimizer: LambdaLR(optimizer, SCHEDULES[schedule](steps, warmup))
