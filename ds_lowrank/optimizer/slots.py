"""The parameters of an optimizer as a step finds them: one slot for each logical matrix or vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_lowrank.methods.base import State
from ds_lowrank.methods.blocks.state_spec import StateStore
from ds_lowrank.optimizer.roles import Role
from ds_lowrank.optimizer.stack import SteppedMatrix
from ds_lowrank.placement.fragment import Fragment
from ds_lowrank.placement.parameter_names import Tag
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.logical import Logical


@dataclass
class Slot:
    """One logical matrix or vector: what it is, where this rank's elements of it are, and its state.

    Attributes:
        tag: its name and kind.
        role: whether it is projected, and why.
        shape: the logical shape, before any kind of parallelism.
        group: the parameter group it is in.
        matrix: as a step finds it: a parameter that is not a matrix counts as one row.
        rank_text: the rank as the role table shows it.
        parameter: the model's parameter; several slots share that of a fused weight.
        logical: where in the parameter the elements are that the slot steps.
        whole: the logical matrix or vector that they belong to, before it was taken as one row or as a shard.
        stepped: whether the last step changed it.
        perturbed: whether its gradient was taken as the method's ``ascent`` asks.
    """

    tag: Tag
    role: Role
    shape: tuple[int, ...]
    group: dict[str, Any]
    matrix: SteppedMatrix
    rank_text: str
    parameter: torch.nn.Parameter
    logical: Logical
    whole: Logical
    stepped: bool = False
    perturbed: bool = False

    @property
    def fragment(self) -> Fragment:
        """Where its elements are on this rank."""
        return self.matrix.fragment

    @property
    def geometry(self) -> Geometry:
        """How it is cut over the ranks."""
        return self.matrix.geometry

    @property
    def state(self) -> State:
        """What the method keeps, and ``step``."""
        return self.matrix.state

    @property
    def plain_values(self) -> dict[str, Any]:
        """What its state has besides tensors, such as ``step``."""
        return {key: value for key, value in self.state.items() if not isinstance(value, torch.Tensor)}

    @property
    def state_store(self) -> StateStore:
        """How its state is laid out and stored."""
        return self.matrix.state_store

    @property
    def is_projected(self) -> bool:
        """Whether the method steps it; otherwise AdamW does."""
        return self.role.projected

    @property
    def is_accumulated(self) -> bool:
        """Whether its gradient may be gone before the step, because what the step needs of it was found before."""
        return self.is_projected and self.matrix.options.reduction == "projected"

    @property
    def copies(self) -> int:
        """How many tensor-parallel ranks step a copy of it, and keep its state."""
        return len(self.logical.strips) if self.logical.placement == "replicated" else 1

    @property
    def rank(self) -> int:
        """The present rank of a projected matrix; 0 for anything else."""
        return self.state_store.rank_of(self.state) if self.is_projected else 0

    @property
    def state_elements(self) -> int:
        """Elements of its initial state, summed over ranks."""
        return self.state_store.numel

    @property
    def state_bytes(self) -> int:
        """Bytes of its state tensors now, summed over the ranks that share it."""
        return self.state_store.nbytes(self.state)

    @property
    def is_fp32(self) -> bool:
        """Whether weights and moments are stored in the dtype they are computed in; the same on all ranks."""
        return self.state_store.is_exact and self.fragment.store.dtype == torch.float32

    @property
    def has_begun(self) -> bool:
        """Whether it has been stepped before.

        A parameter waits for its first gradient that is not all zero: a zero matrix has no subspace, and DeepSpeed
        steps once with zeros while it is constructed (stage 0 in bf16 and fp16).
        """
        return self.matrix.has_begun

    def mark_stepped(self) -> None:
        """Note that the last step changed the parameter."""
        self.stepped, self.perturbed = True, False


def groups_of(slots: Sequence[Slot]) -> list[dict[str, Any]]:
    """The parameter groups of some slots, each once.

    Args:
        slots: any slots of one optimizer.
    """
    return list({id(slot.group): slot.group for slot in slots}.values())
