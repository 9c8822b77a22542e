"""The parameters of an optimizer as a step sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ds_lowrank.methods.base import Layout, Options, Rows, Seen, State
from ds_lowrank.roles import Role, Tag
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.zero import Fragment

WAVE = 2**28
"""Matrices with up to so many elements of state (1 GiB in fp32) are in flight at a time."""


@dataclass(frozen=True)
class Matrix:
    """A projected matrix.

    Attributes:
        rank: with which it starts.
        rank_text: the rank as the role table shows it.
        layout: what the method keeps at a rank.
    """

    shard: MatrixShard
    rank: int
    rank_text: str
    layout: Callable[[int], Layout]

    @cached_property
    def elements(self) -> int:
        """Of the state at the start, over all ranks."""
        return sum(rows.numel for rows in self.layout(self.rank).values() if isinstance(rows, Rows))

    def empty_state(self, device: torch.device) -> State:
        """The state before the first step."""
        return {
            key: torch.zeros(rows.shape, dtype=rows.dtype, device=device) if isinstance(rows, Rows) else rows
            for key, rows in self.layout(self.rank).items()
        }


@dataclass
class Slot:
    """One parameter: what it is, where this rank's elements of it are, and its state.

    Attributes:
        world: over how many ranks it is split.
        state: what the method keeps, and ``step``.
        matrix: None where the parameter is not projected.
        stepped: whether the last step changed it.
    """

    tag: Tag
    role: Role
    shape: tuple[int, ...]
    group: dict[str, Any]
    fragment: Fragment
    world: int
    state: State
    matrix: Matrix | None = None
    stepped: bool = False

    @property
    def rank(self) -> int:
        """The present rank of a projected matrix; 0 for anything else."""
        if self.matrix is None:
            return 0
        rank: int = self.state.get("rank", self.matrix.rank)
        return rank

    @property
    def state_bytes(self) -> int:
        """Of a projected matrix's tensors now, over all ranks that share it; 0 for anything else."""
        if self.matrix is None:
            return 0
        return sum(rows.nbytes for rows in self.matrix.layout(self.rank).values() if isinstance(rows, Rows))

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
    matrix: Matrix
    options: Options
    seen: Seen = field(init=False)

    @property
    def shard(self) -> MatrixShard:
        return self.matrix.shard


def waves(matrices: Sequence[Work]) -> list[list[Work]]:
    """Cut the matrices into runs of at most WAVE elements of state; the same cut on all ranks.

    What a step gathers of a matrix, its basis and directions, is about as large as its state at the rank it starts
    with, which is the largest.
    """
    cut: list[list[Work]] = []
    size = WAVE
    for work in matrices:
        own = work.matrix.elements
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
