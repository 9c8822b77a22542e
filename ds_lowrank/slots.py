"""The parameters of an optimizer as a step sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_lowrank.methods.base import Options, Projection, State
from ds_lowrank.roles import Role, Tag
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.zero import Fragment

WAVE = 2**28
"""Matrices of up to so many elements of bases and directions (1 GiB in fp32) are in flight at a time."""


@dataclass
class Slot:
    """One parameter: what it is, where this rank's elements of it are, and its state.

    Attributes:
        world: over how many ranks it is split.
        shard: None where the parameter is not projected.
        stepped: whether the last step changed it.
    """

    tag: Tag
    role: Role
    shape: tuple[int, ...]
    group: dict[str, Any]
    fragment: Fragment
    world: int
    shard: MatrixShard | None
    state: State
    stepped: bool = False

    @property
    def rank(self) -> int:
        """Of a projected matrix."""
        rank: int = self.state["basis"].shape[1]
        return rank

    @property
    def has_begun(self) -> bool:
        """A parameter waits for its first gradient that is not all zero.

        A zero matrix has no subspace, and DeepSpeed steps once with zeros while it is constructed (stage 0 in bf16 and
        fp16).
        """
        return bool(self.state["step"] > 0)

    def count_step(self) -> None:
        """Note that the parameter was changed."""
        self.state["step"] += 1
        self.stepped = True


@dataclass
class Work:
    """One projected matrix in one step."""

    slot: Slot
    shard: MatrixShard
    options: Options
    seen: Projection = field(init=False)


def waves(matrices: Sequence[Work]) -> list[list[Work]]:
    """Cut the matrices into runs whose bases and directions stay below WAVE elements; the same cut on all ranks."""
    cut: list[list[Work]] = []
    size = WAVE
    for work in matrices:
        own = sum(work.slot.shape) * work.slot.rank
        if size + own > WAVE:
            cut.append([])
            size = 0
        cut[-1].append(work)
        size += own
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


def effective_lr(group: dict[str, Any]) -> float:
    """The learning rate of a group: what the scheduler wrote, times the group's own factor."""
    lr: float = group["lr"] * group["lr_scale"]
    return lr
