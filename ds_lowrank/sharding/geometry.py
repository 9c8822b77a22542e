"""How matrices are cut over the ranks that share them: the same for all matrices of a stack."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Literal

from ds_lowrank.sharding.axis import AxisLayout
from ds_lowrank.sharding.layout import EMPTY, Part, Range

Side = Literal["left", "right"]


class Geometry:
    """Which elements of a matrix each rank has, and which of its dimensions is compressed.

    Args:
        shape: the logical ``(m, n)``.
        parts: what each rank of the group holds.
        rank: this rank's index in the group.
        side: ``right`` compresses the columns, ``left`` the rows.
        block_rows: how many consecutive rows of the state have one owner.
        peers: the ranks of the group that share this copy of the matrix; None for all of them. Tensor-parallel ranks
            that each have a copy form several such sets.
        transposed: whether the layer stores the matrix input x output, so that its columns are the output units.

    Attributes:
        part: what this rank holds.
        peers: as given; equal peers are one object.
        holders: the ranks that hold elements, in rank order.
        copies: how many ranks hold each element: one, or under projected reduction as many as there are data-parallel
            ranks. The gradient is then the sum of theirs, and their weights are equal.
        derived: a cache of what depends on the geometry alone, under any key.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        parts: Sequence[Part],
        rank: int,
        side: Side,
        block_rows: int = 1,
        peers: Sequence[int] | None = None,
        transposed: bool = False,
    ) -> None:
        self.shape, self.side, self.rank, self.block_rows = shape, side, rank, block_rows
        self.parts, self.transposed = tuple(parts), transposed
        self.part = parts[rank]
        self.peers = _interned(tuple(range(len(parts))) if peers is None else tuple(peers))
        self._counts = {holder: part.numel for holder, part in enumerate(parts) if part.numel}
        self.holders = tuple(self._counts)
        self.copies = max(1, sum(self._counts.values()) // max(1, shape[0] * shape[1]))
        self.derived: dict[Hashable, Any] = {}

    @cached_property
    def key(self) -> Hashable:
        """Geometries with equal keys are the same for every purpose."""
        held = tuple((holder, self.parts[holder]) for holder in self.holders)
        return self.shape, held, len(self.parts), self.side, self.block_rows, self.peers, self.transposed

    def axis(self, size: int, held: Mapping[int, Range]) -> AxisLayout:
        """Lay out an axis whose rows are dealt over the ranks by how many elements of the matrix each holds.

        Args:
            size: length of the axis.
            held: for each holder, the range of rows that its elements touch.
        """
        return AxisLayout(size, held, self._counts, self.peers, self.block_rows)

    @cached_property
    def rows(self) -> AxisLayout:
        """The rows of the matrix, as an axis."""
        return self.axis(self.shape[0], {holder: self.parts[holder].rows for holder in self.holders})

    @cached_property
    def columns(self) -> AxisLayout:
        """The columns of the matrix, as an axis."""
        return self.axis(self.shape[1], {holder: self.parts[holder].cols for holder in self.holders})

    @cached_property
    def elements(self) -> AxisLayout:
        """The elements of the matrix, as an axis of one row each: every rank owns those it holds.

        They are numbered as in the row-major matrix or, if a rank's elements are not an interval of it, rank by rank.
        """
        total = sum(self._counts.values())
        intervals = {holder: self.parts[holder].flat_interval(self.shape[1]) for holder in self.holders}
        held = {holder: interval for holder, interval in intervals.items() if interval is not None}
        if len(held) < len(intervals):
            ends = accumulate(self._counts.values())
            held = {h: (end - self._counts[h], end) for h, end in zip(self.holders, ends, strict=True)}
        return self.axis(total, held)

    @property
    def kept(self) -> AxisLayout:
        """The dimension that is not compressed: the rows of ``H`` and of the moments."""
        return self.rows if self.side == "right" else self.columns

    @property
    def compressed(self) -> AxisLayout:
        """The dimension that is compressed: the columns of ``H``, the rows of the basis."""
        return self.columns if self.side == "right" else self.rows

    def replicated(self, rows: int) -> AxisLayout:
        """The axis of a small tensor that every rank with a part of the matrix holds whole.

        Args:
            rows: number of rows of the tensor.
        """
        key = ("replicated", rows)
        if key not in self.derived:
            self.derived[key] = self.axis(rows, dict.fromkeys(self.holders, (0, rows)))
        layout: AxisLayout = self.derived[key]
        return layout

    def grouped(self, rows_per_group: int) -> AxisLayout:
        """The kept dimension in groups of consecutive rows.

        Args:
            rows_per_group: rows that become one row of the axis; divides the kept dimension.
        """
        if rows_per_group == 1:
            return self.kept
        key = ("grouped", rows_per_group)
        if key not in self.derived:
            held = {}
            for holder in self.holders:
                part = self.parts[holder]
                lo, hi = part.rows if self.side == "right" else part.cols
                held[holder] = lo // rows_per_group, -(-hi // rows_per_group)
            self.derived[key] = self.axis(self.kept.size // rows_per_group, held)
        layout: AxisLayout = self.derived[key]
        return layout

    @cached_property
    def elsewhere(self) -> Geometry:
        """A matrix that only takes up rounds here, because other ranks hold it: no rank has an element of it."""
        parts = [EMPTY] * len(self.parts)
        return Geometry(self.shape, parts, self.rank, self.side, self.block_rows, self.peers, self.transposed)


@lru_cache(maxsize=64)
def _interned(peers: tuple[int, ...]) -> tuple[int, ...]:
    """The same object for equal peers, which can be told apart without a look at every rank."""
    return peers
