"""A logical matrix: what a model without tensor parallelism would have, and where each rank stores its elements.

Seeds, state and steps belong to logical matrices, so they do not depend on how a model is split. One parameter is one
logical matrix, or several where a weight is fused. This file is geometry: how DeepSpeed's and megatron-core's marks
become logical matrices is in :mod:`ds_lowrank.placement.tensor_parallel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.sharding.layout import EMPTY, Block, ContiguousPart, FusedPart, Part, Spans


@dataclass(frozen=True)
class Strip:
    """Consecutive elements of a parameter on one tensor-parallel rank that are a block of a logical matrix.

    Attributes:
        start: where they begin among the rank's elements of the parameter.
        block: the rows and columns of the logical matrix that they are, row-major.
    """

    start: int
    block: Block


@dataclass(frozen=True)
class Logical:
    """One logical matrix (or vector), and where every tensor-parallel rank stores its elements.

    Attributes:
        name: the key of its state and the seed of its random numbers.
        shape: shape of the whole matrix. The strips of anything that is not a matrix describe its elements as one row.
        strips: for each tensor-parallel rank, its strips in storage order.
        own: this rank's index among the tensor-parallel ranks.
        placement: ``sharded`` if the ranks share the matrix; ``replicated`` if each has a copy; ``local`` if each
            projects its shard as a matrix of its own (``tensor_parallel_projection``).
        piece: which of the matrices in a fused weight this is; None for a parameter that is not fused.
    """

    name: str
    shape: tuple[int, ...]
    strips: tuple[tuple[Strip, ...], ...]
    own: int
    placement: Literal["sharded", "replicated", "local"]
    piece: str | None = None

    def part(self, tensor_rank: int, start: int, end: int) -> Part:
        """Find the part of this matrix in an interval of the parameter.

        Args:
            tensor_rank: the tensor-parallel rank whose parameter it is.
            start: first element of the interval, counted within that rank's parameter.
            end: one past the last element.
        """
        parts = [part for _, part in self._cuts(tensor_rank, start, end)]
        if len(parts) == 1:
            return parts[0]
        return FusedPart(tuple(parts)) if parts else EMPTY

    def spans(self, start: int, end: int) -> Spans:
        """Find where this matrix's elements are in an interval of this rank's parameter.

        Args:
            start: first element of the interval, counted within the parameter.
            end: one past the last element.

        Returns:
            Spans of elements counted from ``start``.
        """
        return tuple((first, first + part.numel) for first, part in self._cuts(self.own, start, end))

    def _cuts(self, tensor_rank: int, start: int, end: int) -> Iterator[tuple[int, ContiguousPart]]:
        """Cut an interval of a rank's parameter by its strips: the position from ``start`` and the part of each."""
        for strip in self.strips[tensor_rank]:
            lo, hi = max(start, strip.start), min(end, strip.start + strip.block.numel)
            if lo < hi:
                yield lo - start, ContiguousPart(strip.block, lo - strip.start, hi - strip.start)

    def shard_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This tensor-parallel rank's elements of a whole tensor, for a parameter that is not fused.

        Args:
            whole: the whole tensor, of :attr:`shape`, any dtype.

        Returns:
            The elements in storage order: flat, same dtype.
        """
        matrix = whole if whole.ndim == 2 else whole.reshape(1, -1)
        (strip,) = self.strips[self.own]
        return matrix[slice(*strip.block.rows), slice(*strip.block.cols)].reshape(-1)

    @property
    def owner(self) -> int | None:
        """The only tensor-parallel rank that has elements of the matrix; None if several have."""
        ranks = [rank for rank, strips in enumerate(self.strips) if strips]
        return ranks[0] if len(ranks) == 1 else None

    def as_row(self) -> Logical:
        """The same elements as one row, for parameters that are stepped element by element."""
        if len(self.shape) != 2:
            return self
        rows, width = self.shape
        if all(strip.block.cols == (0, width) for strips in self.strips for strip in strips):
            flat = tuple(tuple(Strip(s.start, _row(s.block, width)) for s in strips) for strips in self.strips)
        else:
            flat = concatenated_row([sum(strip.block.numel for strip in strips) for strips in self.strips])
        return replace(self, shape=(1, rows * width), strips=flat)

    def as_local(self) -> Logical:
        """This rank's shard as a matrix of its own; a replicated or unsplit matrix is returned as it is.

        A matrix that is whole on one rank, such as an expert, is a matrix of that rank's.

        Raises:
            ConfigError: if one of the ranks has no rows of the matrix.
        """
        if self.placement == "replicated" or len(self.strips) == 1:
            return self
        if self.owner is not None:
            return replace(self, strips=(self.strips[self.owner],) * len(self.strips), placement="local")
        if not all(self.strips):
            raise ConfigError(
                f"tensor-parallel rank {self.strips.index(())} has no rows of {self.name}, so that not every rank can "
                "project its own: set tensor_parallel_projection to 'logical'"
            )
        own = self.strips[self.own]
        ends = [0, *accumulate(strip.block.rows[1] - strip.block.rows[0] for strip in own)]
        width = max((strip.block.cols[1] - strip.block.cols[0] for strip in own), default=0)
        strips = tuple(Strip(s.start, Block(rows, (0, width))) for s, rows in zip(own, pairwise(ends), strict=True))
        return replace(
            self,
            name=f"{self.name}@tensor{self.own}",
            shape=(ends[-1], width),
            strips=(strips,) * len(self.strips),
            placement="local",
        )


def concatenated_row(numels: Sequence[int]) -> tuple[tuple[Strip, ...], ...]:
    """Strips of one row that consists of every rank's elements, rank by rank.

    Args:
        numels: for each tensor-parallel rank, how many elements it has.
    """
    return tuple((Strip(0, Block((0, 1), span)),) for span in pairwise([0, *accumulate(numels)]))


def _row(block: Block, width: int) -> Block:
    """A block of full rows as a range of the row-major matrix, whose rows have ``width`` elements."""
    return Block((0, 1), (block.rows[0] * width, block.rows[1] * width))
