from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.sharding.layout import EMPTY, Block, ContiguousPart, FusedPart, Part, Spans


@dataclass(frozen=True)
class Strip:
    """The elements from ``start`` on of a parameter as it lies on one rank are ``block`` of a logical matrix."""

    start: int
    block: Block


@dataclass(frozen=True)
class Logical:
    """One logical matrix, and where it lies in a parameter on every tensor-parallel rank.

    Attributes:
        name: seeds and state belong to it.
        shape: of the whole of it. Strips of anything but a matrix are of its elements as one row.
        strips: for each tensor-parallel rank.
        own: this rank's number among them.
        placement: whether these ranks share the matrix (``sharded``), each have a copy (``replicated``), or, with a
            local projection, each treat their shard as a matrix of its own (``local``).
        piece: which of a fused weight's matrices this is; None where the parameter is not fused.
    """

    name: str
    shape: tuple[int, ...]
    strips: tuple[tuple[Strip, ...], ...]
    own: int
    placement: Literal["sharded", "replicated", "local"]
    piece: str | None = None

    def part(self, tensor_rank: int, start: int, end: int) -> Part:
        """What the elements ``[start, end)`` of the parameter on some tensor-parallel rank are of this matrix."""
        parts = [part for _, part in self._cuts(tensor_rank, start, end)]
        if len(parts) == 1:
            return parts[0]
        return FusedPart(tuple(parts)) if parts else EMPTY

    def spans(self, start: int, end: int) -> Spans:
        """Where those elements lie on this rank, counted from ``start``."""
        return tuple((first, first + part.numel) for first, part in self._cuts(self.own, start, end))

    def _cuts(self, tensor_rank: int, start: int, end: int) -> Iterator[tuple[int, ContiguousPart]]:
        for strip in self.strips[tensor_rank]:
            lo, hi = max(start, strip.start), min(end, strip.start + strip.block.numel)
            if lo < hi:
                yield lo - start, ContiguousPart(strip.block, lo - strip.start, hi - strip.start)

    def shard_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This tensor-parallel rank's elements of a whole tensor, flat; for a parameter that is not fused."""
        matrix = whole if whole.ndim == 2 else whole.reshape(1, -1)
        (strip,) = self.strips[self.own]
        return matrix[slice(*strip.block.rows), slice(*strip.block.cols)].reshape(-1)

    def as_row(self) -> Logical:
        """The same elements as one row, for what is stepped element by element."""
        if len(self.shape) != 2:
            return self
        rows, width = self.shape
        if all(strip.block.cols == (0, width) for strips in self.strips for strip in strips):
            return replace(
                self,
                shape=(1, rows * width),
                strips=tuple(tuple(Strip(s.start, _row(s.block, width)) for s in strips) for strips in self.strips),
            )
        return replace(self, **_concatenated_row([sum(s.block.numel for s in strips) for strips in self.strips]))

    def as_local(self) -> Logical:
        """This rank's shard as a matrix of its own.

        Raises:
            ConfigError: one of the ranks has nothing of it.
        """
        if self.placement == "replicated" or len(self.strips) == 1:
            return self
        if not all(self.strips):
            raise ConfigError(
                f"tensor-parallel rank {self.strips.index(())} has no rows of {self.name}, so that not every rank can "
                "project its own: set tensor_parallel_projection to 'logical'"
            )
        own = self.strips[self.own]
        ends = [0, *accumulate(strip.block.rows[1] - strip.block.rows[0] for strip in own)]
        width = max((strip.block.cols[1] - strip.block.cols[0] for strip in own), default=0)
        strips = tuple(Strip(s.start, Block(rows, (0, width))) for s, rows in zip(own, pairwise(ends), strict=True))
        name, everybody = f"{self.name}@tensor{self.own}", (strips,) * len(self.strips)
        return replace(self, name=name, shape=(ends[-1], width), strips=everybody, placement="local")


def _row(block: Block, width: int) -> Block:
    return Block((0, 1), (block.rows[0] * width, block.rows[1] * width))


def _concatenated_row(numels: list[int]) -> dict[str, Any]:
    """Shape and strips of one row in which every rank's elements follow those of the rank before."""
    ends = [0, *accumulate(numels)]
    return {"shape": (1, ends[-1]), "strips": tuple((Strip(0, Block((0, 1), span)),) for span in pairwise(ends))}
