"""What a program asks for: rows of a tall tensor, or a sum of a few numbers."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ds_lowrank.sharding.route import StackRoute, SumRoute

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """Rows of a tall tensor of every matrix in a stack, to be exchanged and summed over ranks.

    Attributes:
        route: who has and who wants which rows, or that a few numbers are to be summed over all peers.
        value: the rows that this rank has, matrices x rows x k, any floating dtype. The answer, fp32, is the rows that
            it wants.
    """

    route: StackRoute | SumRoute
    value: torch.Tensor

    def answer_shape(self, rank: int) -> tuple[int, int, int]:
        """The shape of the answer on a rank: matrices x rows x k."""
        matrices, rows, columns = self.value.shape
        if isinstance(self.route, SumRoute):
            return matrices, rows, columns
        return self.route.answer_shape(rank, columns)

    def is_identity(self, rank: int) -> bool:
        """Whether the answer on a rank is its value."""
        if isinstance(self.route, SumRoute):
            return all(peers == {rank} for peers in self.route.peers)
        return self.route.is_identity(rank)

    def is_silent(self, rank: int) -> bool:
        """Whether a rank sends nothing to another."""
        if isinstance(self.route, SumRoute):
            return self.is_identity(rank)
        return self.route.is_silent(rank)


Program = Generator["Request | tuple[Request, ...]", Any, T]
"""What one stack does: yields a request and is sent the answer, or yields a tuple of requests and is sent a tuple."""
Rounds = Generator[list["Request"], list[torch.Tensor], T]
"""What many stacks do in lockstep: yields the requests of a round and is sent their answers."""
