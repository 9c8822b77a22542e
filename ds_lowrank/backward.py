"""One call for the forward and backward passes of an optimizer step, whatever the optimizer needs from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Forward = Callable[[], torch.Tensor]
"""Runs the model on one micro-batch and returns its loss, a scalar. May be called several times."""


def forward_backward(engine: Any, forwards: Forward | Sequence[Forward]) -> list[torch.Tensor]:
    """Forward and backward of one optimizer step's micro-batches; ``engine.step()`` comes next.

    The same call serves every optimizer: for one that looks at the loss around the weights first, it does that too.

    Args:
        engine: of DeepSpeed.
        forwards: one for every micro-batch of the step, in order; a single one may stand for a list of one.

    Returns:
        The losses, detached, in order.
    """
    steps = [forwards] if callable(forwards) else list(forwards)
    losses = []
    for number, forward in enumerate(steps, 1):
        loss = forward()
        engine.backward(loss)
        losses.append(loss.detach())
        if number < len(steps):
            engine.step()  # inside an accumulation window it only counts
    return losses
