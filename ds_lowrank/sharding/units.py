"""The gradient cut into units of another granularity (VLoRP): fractions of a row, or several rows together.

Write ``H`` (kept x compressed) row by row and cut it into units of equal length. A granularity of ``c`` means ``c``
units per row. For ``c = p / q`` in lowest terms, every ``q`` consecutive rows, called a *group*, hold ``p`` units. A
projection maps each unit to r numbers, so the projected gradient has one row of ``p * r`` numbers per group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.layout import EMPTY, Part, Rectangle, whole
from ds_lowrank.sharding.matrix import MatrixShard


class Units:
    """One rank's part of a gradient, cut into units.

    Args:
        shard: the matrix.
        granularity: units per row; ``kept * granularity`` and ``compressed / granularity`` must be integers.

    Attributes:
        per_group: units per group.
        rows_per_group: kept rows per group.
        length: elements per unit.
        axis: the kept dimension in groups.
    """

    def __init__(self, shard: MatrixShard, granularity: Fraction) -> None:
        self.shard = shard
        self.per_group, self.rows_per_group = granularity.numerator, granularity.denominator
        self.length = shard.compressed.size * self.rows_per_group // self.per_group
        self.axis = grouped(shard, self.rows_per_group)

    def times(self, projection: torch.Tensor) -> torch.Tensor:
        """Project every unit: this rank's contribution to ``unit @ projection``.

        Args:
            projection: length x r, fp32.

        Returns:
            held groups x (per_group * r), fp32.
        """
        groups = self.axis.held[1] - self.axis.held[0]
        result = projection.new_zeros(groups, self.per_group, projection.shape[1])
        for rectangle, gradient in zip(self.shard.part.rectangles, self.shard.gradient, strict=True):
            oriented = self._oriented(gradient)
            for piece in self._pieces(rectangle):
                units = _stacked(oriented, piece).float()
                factor = projection[piece.entries].expand(piece.stack, -1, -1)
                result[piece.groups, piece.units] += torch.bmm(units, factor).transpose(0, 1)
        return result.flatten(1)

    def lift(self, projected: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Lift every unit back: its r numbers times ``projection^T``, on the elements this rank holds.

        Args:
            projected: held groups x (per_group * r), fp32.
            projection: length x r, fp32.

        Returns:
            This rank's elements of the lifted matrix: flat, fp32.
        """
        flat = torch.empty(self.shard.part.numel, dtype=torch.float32, device=projected.device)
        stacked = projected.view(projected.shape[0], self.per_group, projection.shape[1])
        for rectangle, view in zip(self.shard.part.rectangles, self.shard.views(flat), strict=True):
            oriented = self._oriented(view)
            for piece in self._pieces(rectangle):
                low = stacked[piece.groups, piece.units].transpose(0, 1)
                factor = projection[piece.entries].T.expand(piece.stack, -1, -1)
                _stacked(oriented, piece).copy_(torch.bmm(low, factor))
        return flat

    def _oriented(self, rectangle: torch.Tensor) -> torch.Tensor:
        """A view of a rectangle with the kept dimension first."""
        return rectangle if self.shard.side == "right" else rectangle.T

    def _pieces(self, rectangle: Rectangle) -> Iterator[Piece]:
        """Cut a rectangle so that each piece has the same elements of every unit it touches."""
        row, height, col, width = rectangle.row, rectangle.height, rectangle.col, rectangle.width
        if self.shard.side == "left":
            row, height, col, width = col, width, row, height
        for row_of_group in range(self.rows_per_group):
            first = (row_of_group - row) % self.rows_per_group
            if first >= height:
                continue
            group = (row + first) // self.rows_per_group - self.axis.held[0]
            groups = slice(group, group + len(range(first, height, self.rows_per_group)))
            start = row_of_group * self.shard.compressed.size
            for lo, hi in self._cuts(start + col, start + col + width):
                unit = lo // self.length
                stack = max(1, (hi - lo) // self.length)
                entry = lo - unit * self.length
                yield Piece(
                    kept=slice(first, height, self.rows_per_group),
                    compressed=slice(lo - start - col, hi - start - col),
                    groups=groups,
                    units=slice(unit, unit + stack),
                    entries=slice(entry, entry + (hi - lo) // stack),
                )

    def _cuts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut an interval of a group into the end of one unit, whole units, and the beginning of another."""
        whole_start, whole_end = -(-start // self.length) * self.length, end // self.length * self.length
        edges = {start, end} | ({whole_start, whole_end} if whole_start <= whole_end else set())
        return pairwise(sorted(edges))


def grouped(shard: MatrixShard, rows_per_group: int) -> Axis:
    """The kept dimension of a matrix in groups of consecutive rows.

    Args:
        shard: the matrix.
        rows_per_group: rows that become one row of the axis; divides the kept dimension.
    """
    if rows_per_group == 1:
        return shard.kept
    key = ("grouped", rows_per_group)
    if key not in shard.derived:
        ranges = [part.rows if shard.side == "right" else part.cols for part in shard.parts]
        held = [(lo // rows_per_group, -(-hi // rows_per_group)) for lo, hi in ranges]
        shard.derived[key] = shard.axis(shard.kept.size // rows_per_group, held)
    axis: Axis = shard.derived[key]
    return axis


def viewed(shard: MatrixShard, shape: tuple[int, int]) -> MatrixShard:
    """The same elements in the same storage, viewed as a matrix of another shape.

    Args:
        shard: the matrix, with gradient and weights attached.
        shape: the new ``(m, n)``, with as many elements.

    Raises:
        ConfigError: if tensor parallelism splits the columns, or the matrix is stored transposed, so that a rank's
            elements are not an interval of the row-major matrix.
    """
    if shard.transposed:
        raise ConfigError(
            f"{shard.name}: its layer stores it transposed, so it has no view of another shape; set left_view to "
            "'transpose'"
        )
    key = ("viewed", shape)
    if key not in shard.derived:
        parts = [_viewed_part(shard, part, shape) for part in shard.parts]
        shard.derived[key] = MatrixShard(
            name=shard.name,
            shape=shape,
            parts=parts,
            rank=shard.rank,
            side=shard.side,
            root=shard.root,
            block_rows=shard.block_rows,
            peers=shard.peers,
        )
    view: MatrixShard = copy.copy(shard.derived[key])
    view.attach(shard.flat_gradient, shard.weights)
    return view


def _viewed_part(shard: MatrixShard, part: Part, shape: tuple[int, int]) -> Part:
    """One rank's part in the matrix of another shape."""
    interval = part.flat_interval(shard.shape[1])
    if interval is None:
        raise ConfigError(
            f"{shard.name}: tensor parallelism splits its columns, so it has no view of another shape; set left_view "
            "to 'transpose', or tensor_parallel_projection to 'local'"
        )
    start, end = interval
    return whole(shape, start, end) if part.numel else EMPTY


class Piece(NamedTuple):
    """Elements of a rectangle that are the same entries of several units.

    Attributes:
        kept: rows of the rectangle, kept dimension first.
        compressed: columns of the rectangle, kept dimension first.
        groups: the groups, counted from the first one that this rank holds.
        units: the units within each of these groups.
        entries: which elements of a unit these are.
    """

    kept: slice
    compressed: slice
    groups: slice
    units: slice
    entries: slice

    @property
    def stack(self) -> int:
        """How many units are next to each other in the columns."""
        count: int = self.units.stop - self.units.start
        return count


def _stacked(oriented: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A view of a piece as units x kept rows x entries of a unit."""
    part = oriented[piece.kept, piece.compressed]
    kept, compressed = part.stride()
    entries = part.shape[1] // piece.stack
    shape, stride = (piece.stack, part.shape[0], entries), (entries * compressed, kept, compressed)
    return part.as_strided(shape, stride)
