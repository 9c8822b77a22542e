"""The parameters of an optimizer as a step sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ds_lowrank.methods.base import Options, Seen
from ds_lowrank.methods.keep import Keep, State
from ds_lowrank.roles import Role, Tag
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.tensor_parallel import Logical
from ds_lowrank.sharding.zero import Fragment

WAVE = 2**28
"""Matrices with up to so many elements of state (1 GiB in fp32) are in flight at a time."""


@dataclass
class Slot:
    """One logical matrix or vector: what it is, where this rank's elements of it are, and its state.

    Attributes:
        shape: of the whole, before any kind of parallelism.
        shard: this rank's part; a parameter that is not a matrix counts as one row.
        keep: how its state is laid out and stored.
        rank_text: the rank as the role table shows it.
        state: what the method keeps, and ``step``.
        parameter: of the model; of a fused weight, several slots have the same.
        logical: where what the slot steps lies in the parameter.
        stepped: whether the last step changed it.
        looked_around: whether its gradient was taken as the method's ``climb`` asks.
    """

    tag: Tag
    role: Role
    shape: tuple[int, ...]
    group: dict[str, Any]
    fragment: Fragment
    shard: MatrixShard
    keep: Keep
    rank_text: str
    state: State
    parameter: torch.nn.Parameter
    logical: Logical
    stepped: bool = False
    looked_around: bool = False

    @property
    def is_projected(self) -> bool:
        """Whether the method steps it; AdamW does otherwise."""
        return self.role.projected

    @property
    def copies(self) -> int:
        """How many tensor-parallel ranks step a copy of it, and keep its state."""
        return len(self.logical.strips) if self.logical.held == "copied" else 1

    @property
    def rank(self) -> int:
        """The present rank of a projected matrix; 0 for anything else."""
        return self.keep.rank_of(self.state) if self.is_projected else 0

    @property
    def elements(self) -> int:
        """Of the state at the start, over all ranks."""
        return self.keep.numel

    @property
    def state_bytes(self) -> int:
        """Of its tensors now, over all ranks that share it."""
        return self.keep.nbytes(self.state)

    @property
    def is_fp32(self) -> bool:
        """Whether weights and moments are stored as what they are computed in; the same on all ranks."""
        return self.keep.is_exact and self.fragment.store.dtype == torch.float32

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
        self.stepped, self.looked_around = True, False


T = TypeVar("T", Slot, "Work")


@dataclass
class Work:
    """One projected matrix in one step.

    Attributes:
        seen: what its method found in the gradient; set by the first half of the step.
    """

    slot: Slot
    options: Options
    seen: Seen = field(init=False)

    @property
    def shard(self) -> MatrixShard:
        return self.slot.shard

    @property
    def elements(self) -> int:
        return self.slot.elements


def waves(items: Sequence[T]) -> list[list[T]]:
    """Cut a sequence into runs of at most WAVE elements of state; the same cut on all ranks.

    What a step gathers of a matrix, its basis and directions, is about as large as its state at the rank it starts
    with, which is the largest.
    """
    cut: list[list[T]] = []
    size = WAVE
    for item in items:
        if size + item.elements > WAVE:
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
