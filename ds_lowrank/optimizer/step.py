from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.sharding.matrix import MatrixShard

BUCKET_ELEMENTS = 2**28
"""Matrices with up to so many elements of state (1 GiB in fp32) are in flight at a time."""


T = TypeVar("T", Slot, "PendingUpdate")


@dataclass
class PendingUpdate:
    """One projected matrix in one step.

    Attributes:
        seen: what its method found in the gradient; set by the first half of the step.
    """

    slot: Slot
    options: Options
    seen: ProjectedGradient = field(init=False)

    @property
    def shard(self) -> MatrixShard:
        return self.slot.shard

    @property
    def elements(self) -> int:
        return self.slot.elements


def buckets(items: Sequence[T]) -> list[list[T]]:
    """Cut a sequence into runs of at most WAVE elements of state; the same cut on all ranks.

    What a step gathers of a matrix, its basis and directions, is about as large as its state at the rank it starts
    with, which is the largest.
    """
    cut: list[list[T]] = []
    size = BUCKET_ELEMENTS
    for item in items:
        if size + item.elements > BUCKET_ELEMENTS:
            cut.append([])
            size = 0
        cut[-1].append(item)
        size += item.elements
    return cut


def largest_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    """A scalar, fp32; NaN where an element is, zero for no elements."""
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    low, high = torch.aminmax(tensor)  # one pass, no copy; the inf-norm is forty times slower on a CPU
    return torch.maximum(-low, high).float()


def groups_of(slots: Sequence[Slot]) -> list[dict[str, Any]]:
    """The parameter groups of some slots, each once."""
    return list({id(slot.group): slot.group for slot in slots}.values())
