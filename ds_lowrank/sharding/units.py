"""The gradient in units of another granularity: pieces of a row, or several rows together.

With ``H`` (kept x compressed) written row after row and cut into units of equal length, a granularity of ``c`` means
``c`` units a row. For ``c = p / q`` in lowest terms ``q`` rows together, a *group*, hold ``p`` units. A projection maps
every unit to r numbers, so the projected gradient has a row of ``p * r`` numbers for every group.
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


class Piece(NamedTuple):
    """Where a rectangle meets the units: all indices but the last within what this rank holds.

    Attributes:
        kept, compressed: rows and columns of the turned rectangle.
        groups, units: the groups, and the units within each.
        entries: which elements of a unit these are.
    """

    kept: slice
    compressed: slice
    groups: slice
    units: slice
    entries: slice

    @property
    def stack(self) -> int:
        """How many units stand side by side in the columns."""
        count: int = self.units.stop - self.units.start
        return count


class Units:
    """One rank's part of a gradient in units.

    Args:
        shard: the matrix.
        granularity: units a row; ``kept * granularity`` and ``compressed / granularity`` must be whole.
    """

    def __init__(self, shard: MatrixShard, granularity: Fraction) -> None:
        self.shard = shard
        self.per_group, self.rows_per_group = granularity.numerator, granularity.denominator
        self.length = shard.compressed.size * self.rows_per_group // self.per_group
        self.axis = grouped(shard, self.rows_per_group)

    def times(self, projection: torch.Tensor) -> torch.Tensor:
        """This rank's part of every unit times ``projection``.

        Args:
            projection: length x r, fp32.

        Returns:
            held groups x (units a group * r), fp32.
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
        """Every unit's numbers times ``projection^T``, on the elements this rank holds.

        Args:
            projected: held groups x (units a group * r), fp32.
            projection: length x r, fp32.

        Returns:
            The elements of this rank's part, flat, fp32.
        """
        flat = torch.empty(self.shard.part.numel, device=projected.device)
        stacked = projected.view(projected.shape[0], self.per_group, projection.shape[1])
        for rectangle, view in zip(self.shard.part.rectangles, self.shard.views(flat), strict=True):
            oriented = self._oriented(view)
            for piece in self._pieces(rectangle):
                low = stacked[piece.groups, piece.units].transpose(0, 1)
                factor = projection[piece.entries].T.expand(piece.stack, -1, -1)
                _stacked(oriented, piece).copy_(torch.bmm(low, factor))
        return flat

    def _oriented(self, rectangle: torch.Tensor) -> torch.Tensor:
        return rectangle if self.shard.side == "right" else rectangle.T

    def _pieces(self, rectangle: Rectangle) -> Iterator[Piece]:
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
                yield Piece(
                    slice(first, height, self.rows_per_group),
                    slice(lo - start - col, hi - start - col),
                    groups,
                    slice(unit, unit + stack),
                    slice(lo - unit * self.length, lo - unit * self.length + (hi - lo) // stack),
                )

    def _cuts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The interval of a group as the end of one unit, whole units, and the beginning of another."""
        whole_start, whole_end = -(-start // self.length) * self.length, end // self.length * self.length
        edges = {start, end} | ({whole_start, whole_end} if whole_start <= whole_end else set())
        return pairwise(sorted(edges))


def grouped(shard: MatrixShard, every: int) -> Axis:
    """The kept dimension of a matrix, with ``every`` consecutive rows of it taken as one."""
    if every == 1:
        return shard.kept
    key = ("grouped", every)
    if key not in shard.derived:
        ranges = [part.rows if shard.side == "right" else part.cols for part in shard.parts]
        held = [(lo // every, -(-hi // every)) for lo, hi in ranges]
        shard.derived[key] = shard.axis(shard.kept.size // every, held)
    axis: Axis = shard.derived[key]
    return axis


def viewed(shard: MatrixShard, shape: tuple[int, int]) -> MatrixShard:
    """The same elements in the same storage, as a matrix of another shape.

    Raises:
        ConfigError: tensor parallelism splits the matrix, so that a rank's storage is not an interval of it.
    """
    key = ("viewed", shape)
    if key not in shard.derived:
        parts = [_viewed_part(shard, part, shape) for part in shard.parts]
        shard.derived[key] = MatrixShard(
            shard.name, shape, parts, shard.rank, shard.side, shard.root, shard.block_rows, shard.peers
        )
    view: MatrixShard = copy.copy(shard.derived[key])
    view.attach(shard.flat_gradient, shard.weights)
    return view


def _viewed_part(shard: MatrixShard, part: Part, shape: tuple[int, int]) -> Part:
    interval = part.flat_interval(shard.shape[1])
    if interval is None:
        raise ConfigError(
            f"{shard.name}: tensor parallelism splits its columns, so it has no view of another shape; set left_view "
            "to 'transpose', or tensor_parallel_projection to 'local'"
        )
    return whole(shape, *interval) if part.numel else EMPTY


def _stacked(oriented: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A view of a piece: units x kept rows x elements of a unit."""
    part = oriented[piece.kept, piece.compressed]
    kept, compressed = part.stride()
    entries = part.shape[1] // piece.stack
    shape, stride = (piece.stack, part.shape[0], entries), (entries * compressed, kept, compressed)
    return part.as_strided(shape, stride)
