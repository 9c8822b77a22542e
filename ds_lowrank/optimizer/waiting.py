"""Which parameters have an optimizer of this package that has not begun: it may have been dropped for another one."""

from __future__ import annotations

from collections.abc import Iterable

import torch

WAITS = "ds_lowrank_waits"
"""The attribute of a parameter that names the optimizer which was built for it and is not bound yet."""


def mark_waiting(parameters: Iterable[torch.Tensor], method: str | None) -> None:
    """Note that an optimizer was built for parameters, or that it has been bound.

    Args:
        parameters: the optimizer's.
        method: the optimizer's; None once it is bound.
    """
    for parameter in parameters:
        setattr(parameter, WAITS, method)


def waiting_optimizer(parameter: torch.Tensor) -> str | None:
    """The method of the optimizer that was built for a parameter and is not bound yet; None if there is none."""
    name: str | None = getattr(parameter, WAITS, None)
    return name
