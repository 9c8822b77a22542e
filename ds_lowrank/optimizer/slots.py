"""The parameters of an optimizer as a step sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ds_lowrank.methods.blocks.state_spec import State, StateStore
from ds_lowrank.optimizer.roles import Role
from ds_lowrank.placement.parameter_names import Tag
from ds_lowrank.placement.zero import Fragment
from ds_lowrank.sharding.logical import Logical
from ds_lowrank.sharding.matrix import MatrixShard


@dataclass
class Slot:
    """One logical matrix or vector: what it is, where this rank's elements of it are, and its state.

    Attributes:
        shape: of the whole, before any kind of parallelism.
        shard: this rank's part; a parameter that is not a matrix counts as one row.
        state_store: how its state is laid out and stored.
        rank_text: the rank as the role table shows it.
        state: what the method keeps, and ``step``.
        parameter: of the model; of a fused weight, several slots have the same.
        logical: where what the slot steps lies in the parameter.
        stepped: whether the last step changed it.
        perturbed: whether its gradient was taken as the method's ``ascent`` asks.
    """

    tag: Tag
    role: Role
    shape: tuple[int, ...]
    group: dict[str, Any]
    fragment: Fragment
    shard: MatrixShard
    state_store: StateStore
    rank_text: str
    state: State
    parameter: torch.nn.Parameter
    logical: Logical
    stepped: bool = False
    perturbed: bool = False

    @property
    def is_projected(self) -> bool:
        """Whether the method steps it; AdamW does otherwise."""
        return self.role.projected

    @property
    def copies(self) -> int:
        """How many tensor-parallel ranks step a copy of it, and keep its state."""
        return len(self.logical.strips) if self.logical.placement == "replicated" else 1

    @property
    def rank(self) -> int:
        """The present rank of a projected matrix; 0 for anything else."""
        return self.state_store.rank_of(self.state) if self.is_projected else 0

    @property
    def elements(self) -> int:
        """Of the state at the start, over all ranks."""
        return self.state_store.numel

    @property
    def state_bytes(self) -> int:
        """Of its tensors now, over all ranks that share it."""
        return self.state_store.nbytes(self.state)

    @property
    def is_fp32(self) -> bool:
        """Whether weights and moments are stored as what they are computed in; the same on all ranks."""
        return self.state_store.is_exact and self.fragment.store.dtype == torch.float32

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
        self.stepped, self.perturbed = True, False
