"""The geometry of one matrix over the ranks that share it: its axes, and the sums of small tensors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch

from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.layout import Part, Range
from ds_lowrank.sharding.reduce import Program, Request, all_reduce_route

Side = Literal["left", "right"]


class MatrixAxes:
    """One rank's part of one logical matrix, without its elements.

    Args:
        name: the parameter's name; seeds derive from it.
        shape: the logical ``(m, n)``.
        parts: what each rank of the group holds.
        rank: this rank's index in the group.
        side: ``right`` compresses the columns, ``left`` the rows.
        root: the rank that runs this matrix's factorizations.
        block_rows: how many consecutive rows of the state have one owner.
        peers: the ranks of the group that share this copy of the matrix; None for all of them. Tensor-parallel ranks
            that each have a copy form several such sets.

    Attributes:
        part: what this rank holds.
        derived: a cache of what depends on the geometry alone, under any key.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        parts: Sequence[Part],
        rank: int,
        side: Side,
        root: int,
        block_rows: int = 1,
        peers: Sequence[int] | None = None,
    ) -> None:
        self.name, self.shape, self.side, self.rank, self.block_rows = name, shape, side, rank, block_rows
        self.root, self.parts = root, tuple(parts)
        self.part = parts[rank]
        self.peers = tuple(range(len(parts))) if peers is None else tuple(peers)
        self._counts = [part.numel for part in parts]
        self.derived: dict[Hashable, Any] = {}

    def axis(self, size: int, held: Sequence[Range]) -> Axis:
        """Make an axis whose rows are dealt over the ranks by how many elements of the matrix each holds.

        Args:
            size: length of the axis.
            held: for each rank, the range of rows that its elements touch.
        """
        return Axis(size, held, self._counts, self.root, self.rank, self.block_rows, self.peers)

    @cached_property
    def rows(self) -> Axis:
        """The rows of the matrix, as an axis."""
        return self.axis(self.shape[0], [part.rows for part in self.parts])

    @cached_property
    def columns(self) -> Axis:
        """The columns of the matrix, as an axis."""
        return self.axis(self.shape[1], [part.cols for part in self.parts])

    @cached_property
    def elements(self) -> Axis:
        """The elements of the matrix, as an axis of one row each: every rank owns those it holds.

        They are numbered as in the row-major matrix or, if a rank's elements are not an interval of it, rank by rank.
        """
        intervals = [part.flat_interval(self.shape[1]) for part in self.parts]
        if None in intervals:
            ends = list(accumulate(self._counts))
            intervals = [(end - count, end) for end, count in zip(ends, self._counts, strict=True)]
        held = [interval for interval in intervals if interval is not None]
        return self.axis(sum(self._counts), held)

    @property
    def kept(self) -> Axis:
        """The dimension that is not compressed: the rows of ``H`` and of the moments."""
        return self.rows if self.side == "right" else self.columns

    @property
    def compressed(self) -> Axis:
        """The dimension that is compressed: the columns of ``H``, the rows of the basis."""
        return self.columns if self.side == "right" else self.rows

    def replicated_axis(self, rows: int) -> Axis:
        """The axis of a small tensor that every rank with a part of the matrix holds whole.

        Args:
            rows: number of rows of the tensor.
        """
        key = ("replicated_axis", rows)
        if key not in self.derived:
            self.derived[key] = self.axis(rows, [(0, rows) if count else (0, 0) for count in self._counts])
        axis: Axis = self.derived[key]
        return axis

    def replicated_sum(self, value: torch.Tensor) -> Program[torch.Tensor]:
        """Sum a small tensor over the ranks that hold the matrix: a reduce_scatter and an all_gather.

        Args:
            value: rows x columns, fp32: what this rank contributes.

        Returns:
            A program whose result is the sum: rows x columns, fp32; zeros on a rank without a part of the matrix.
        """
        axis = self.replicated_axis(value.shape[0])
        own = yield axis.reduce_scatter(self.local_contribution(value))
        return self.or_zeros((yield axis.all_gather(own)), value.shape[0])

    def local_contribution(self, value: torch.Tensor) -> torch.Tensor:
        """What this rank contributes to the sum of a small tensor: no rows if it has no part of the matrix.

        Args:
            value: rows x columns.
        """
        return value if self.part.numel else value[:0]

    def or_zeros(self, value: torch.Tensor, rows: int) -> torch.Tensor:
        """A small tensor that was gathered, or zeros if this rank has no part of the matrix and was sent no rows.

        Args:
            value: rows x columns, or 0 x columns.
            rows: number of rows of the result.
        """
        return value if self.part.numel else value.new_zeros(rows, value.shape[1])

    def all_reduce(self, value: torch.Tensor) -> Request:
        """Sum a few numbers over all peers. Each gets the same bits, so that all reach the same decision.

        Args:
            value: one number per row: count x k, any floating dtype.

        Returns:
            A request whose answer is count x k, fp32.
        """
        key = ("all_reduce", value.shape[0])
        if key not in self.derived:
            self.derived[key] = all_reduce_route(len(self.parts), value.shape[0], self.peers)
        return Request(self.derived[key], value)
