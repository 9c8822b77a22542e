"""The gradients cut into units of another granularity (VLoRP): fractions of a row, or several rows together.

Write ``H`` (kept x compressed) row by row and cut it into units of equal length. A granularity of ``c`` means ``c``
units per row. For ``c = p / q`` in lowest terms, every ``q`` consecutive rows, called a *group*, hold ``p`` units. A
projection maps each unit to r numbers, so the projected gradient has one row of ``p * r`` numbers per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.sharding.elements import Elements, Piece
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.layout import EMPTY, Part, Rectangle, whole
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.precision import products_in


class Units:
    """One rank's part of the gradients of a stack, cut into units.

    Args:
        shard: the stack.
        granularity: units per row; ``kept * granularity`` and ``compressed / granularity`` must be integers.
        is_view: whether the stack was :func:`viewed`; pieces are then of the original matrices.

    Attributes:
        per_group: units per group.
        rows_per_group: kept rows per group.
        length: elements per unit.
        axis: the kept dimension in groups.
    """

    def __init__(self, shard: MatrixShard, granularity: Fraction, is_view: bool = False) -> None:
        self.shard, self._is_view = shard, is_view
        self.per_group, self.rows_per_group = granularity.numerator, granularity.denominator
        self.length = shard.compressed.size * self.rows_per_group // self.per_group
        self.axis = shard.axis(shard.geometry.grouped(self.rows_per_group))

    @property
    def are_in_rows(self) -> bool:
        """Whether every unit is a piece of a kept row of the matrices themselves."""
        return self.rows_per_group == 1 and not self._is_view

    def times(self, projection: torch.Tensor) -> torch.Tensor:
        """Project every unit: this rank's contribution to ``unit @ projection``.

        Args:
            projection: matrices x length x r, fp32.

        Returns:
            matrices x held groups x (per_group * r), fp32.
        """
        with products_in(self.shard.precision, projection.device):
            return self._times(projection)

    def _times(self, projection: torch.Tensor) -> torch.Tensor:
        rank = projection.shape[2]
        shape = len(self.shard), self.axis.held_rows, self.per_group, rank
        if (singles := self._singles(self.shard.gradient)) is not None:
            result = projection.new_empty(shape)
            if self.shard.side == "right":
                outs = result.flatten(1, 2).unbind()
                for matrix, factor, out in zip(singles, projection.unbind(), outs, strict=True):
                    torch.mm(matrix.view(-1, self.length), factor, out=out)
            else:
                for_groups = projection.unsqueeze(1).expand(-1, self.per_group, -1, -1).unbind()
                for matrix, factor, out in zip(singles, for_groups, result.transpose(1, 2).unbind(), strict=True):
                    torch.bmm(matrix.view(self.per_group, self.length, -1).mT, factor, out=out)
            return result.flatten(2)
        result = projection.new_zeros(shape)
        for piece in self.shard.gradient.pieces:
            factors = projection[piece.matrices]
            if self._in_rows(piece):
                out = self._rows(result[piece.matrices].flatten(2), piece, rank)
                torch.bmm(piece.values.reshape(len(out), -1, self.length).float(), factors, out=out)
                continue
            for cut in self._cuts_of(piece.rectangle):
                entries = factors[:, cut.entries]
                parts = zip(result[piece.matrices], entries, self._oriented(piece.values), strict=True)
                for one, factor, oriented in parts:
                    out = one[cut.groups, cut.units].transpose(0, 1)
                    out.baddbmm_(_stacked(oriented, cut).float(), factor.expand(cut.stack, -1, -1))
        return result.flatten(2)

    def _singles(self, elements: Elements) -> list[torch.Tensor] | None:
        """The matrices themselves, if each is in one place and every unit is a piece of a kept row of it."""
        return elements.singles if self.are_in_rows and self._is_uncut else None

    @property
    def _is_uncut(self) -> bool:
        """Whether this rank has whole compressed rows or columns."""
        (r,) = self.shard.part.rectangles if len(self.shard.part.rectangles) == 1 else (None,)
        return r is not None and (r.width if self.shard.side == "right" else r.height) == self.shard.compressed.size

    def lifted_singles(self, projected: torch.Tensor, projection: torch.Tensor) -> Iterator[torch.Tensor] | None:
        """Every unit lifted back, matrix by matrix: rows x columns, fp32; None if the matrices are cut.

        Args:
            projected: matrices x held groups x (per_group * r), fp32.
            projection: matrices x length x r, fp32.
        """
        singles = self._singles(self.shard.weights)
        if singles is None:
            return None
        low = torch.unflatten(projected, 2, (self.per_group, -1))
        if self.shard.side == "right":
            pairs = zip(low.flatten(1, 2).unbind(), projection.mT.unbind(), singles, strict=True)
            return (torch.mm(units, factor).view(matrix.shape) for units, factor, matrix in pairs)
        factors = projection.unsqueeze(1).expand(-1, self.per_group, -1, -1).unbind()
        pairs = zip(low.permute(0, 2, 3, 1).unbind(), factors, singles, strict=True)
        return (torch.bmm(factor, units).view(matrix.shape) for units, factor, matrix in pairs)

    def lift(self, projected: torch.Tensor, projection: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Lift every unit back: its r numbers times ``projection^T``, where a piece is.

        Args:
            projected: matrices x held groups x (per_group * r), fp32.
            projection: matrices x length x r, fp32.
            piece: of this rank's elements.

        Returns:
            The elements of the lifted matrices there: matrices x rows x columns, fp32.
        """
        if self._is_view:
            count, numel = piece.values.shape[0], self.shard.part.numel
            flat = torch.empty(count, numel, dtype=torch.float32, device=projected.device)
            for part in Elements([flat], [count], self.shard.part.rectangles).pieces:
                part.values.copy_(self._lifted(projected, projection, part._replace(matrices=piece.matrices)))
            r = piece.rectangle
            return flat[:, r.offset : r.offset + r.height * r.width].view(piece.values.shape)
        return self._lifted(projected, projection, piece)

    def _lifted(self, projected: torch.Tensor, projection: torch.Tensor, piece: Piece) -> torch.Tensor:
        """The units of :meth:`lift` in a piece of the stack that is cut into units."""
        factors, rank = projection[piece.matrices], projection.shape[2]
        if self._in_rows(piece):
            return torch.bmm(self._rows(projected[piece.matrices], piece, rank), factors.mT).view(piece.values.shape)
        lifted = torch.empty(piece.values.shape, dtype=torch.float32, device=projected.device)
        low = torch.unflatten(projected[piece.matrices], 2, (self.per_group, rank))
        for cut in self._cuts_of(piece.rectangle):
            entries = factors[:, cut.entries].mT
            for one, factor, oriented in zip(low, entries, self._oriented(lifted), strict=True):
                units = one[cut.groups, cut.units].transpose(0, 1)
                torch.bmm(units, factor.expand(cut.stack, -1, -1), out=_stacked(oriented, cut))
        return lifted

    def _in_rows(self, piece: Piece) -> bool:
        """Whether a piece consists of whole rows, stored row by row, and every row of whole units."""
        whole_rows = piece.rectangle.width == self.shard.compressed.size
        return self.shard.side == "right" and self.rows_per_group == 1 and whole_rows

    def _rows(self, groups: torch.Tensor, piece: Piece, rank: int) -> torch.Tensor:
        """The units of a piece of whole rows, matrices x units x r: a view of matrices x held groups x numbers."""
        rows = groups[:, self.shard.held(self.shard.rows, piece.rectangle)]
        return rows.view(rows.shape[0], -1, rank)

    def _oriented(self, values: torch.Tensor) -> torch.Tensor:
        """A view of some rectangles with the kept dimension first."""
        return values if self.shard.side == "right" else values.mT

    def _cuts_of(self, rectangle: Rectangle) -> Iterator[Cut]:
        """Cut a rectangle so that each cut has the same elements of every unit it touches."""
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
                yield Cut(
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


def viewed(shard: MatrixShard, shape: tuple[int, int]) -> MatrixShard:
    """The same elements in the same storage, viewed as matrices of another shape.

    Args:
        shard: the stack, with gradients and weights attached.
        shape: the new ``(m, n)``, with as many elements.

    Raises:
        ConfigError: if tensor parallelism splits the columns, or the matrix is stored transposed, so that a rank's
            elements are not an interval of the row-major matrix.
    """
    geometry, name = shard.geometry, shard.names[0]
    if geometry.transposed:
        raise ConfigError(
            f"{name}: its layer stores it transposed, so it has no view of another shape; set left_view to 'transpose'"
        )
    key = ("viewed", shape)
    if key not in geometry.derived:
        parts = [_viewed_part(geometry, name, part, shape) for part in geometry.parts]
        geometry.derived[key] = Geometry(
            shape, parts, geometry.rank, geometry.side, geometry.block_rows, geometry.peers
        )
    view: MatrixShard = shard.views.setdefault(shape, MatrixShard(geometry.derived[key], shard.members))
    if shard.gradient.runs:
        view.precision = shard.precision
        view.attach(shard.gradient.runs, shard.weights.runs, shard.gradient.sizes)
    return view


def _viewed_part(geometry: Geometry, name: str, part: Part, shape: tuple[int, int]) -> Part:
    """One rank's part in the matrix of another shape."""
    interval = part.flat_interval(geometry.shape[1])
    if interval is None:
        raise ConfigError(
            f"{name}: tensor parallelism splits its columns, so it has no view of another shape; set left_view to "
            "'transpose', or tensor_parallel_projection to 'local'"
        )
    start, end = interval
    return whole(shape, start, end) if part.numel else EMPTY


class Cut(NamedTuple):
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


def _stacked(oriented: torch.Tensor, cut: Cut) -> torch.Tensor:
    """A view of a cut as units x kept rows x entries of a unit."""
    part = oriented[cut.kept, cut.compressed]
    kept, compressed = part.stride()
    entries = part.shape[1] // cut.stack
    shape, stride = (cut.stack, part.shape[0], entries), (entries * compressed, kept, compressed)
    return part.as_strided(shape, stride)
