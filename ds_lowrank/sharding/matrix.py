"""What a method sees of one matrix: its shape, two local products, and the sums it may ask for.

A method compresses one dimension of the gradient and keeps the other. With ``H`` the gradient turned so that the kept
dimension comes first (``G`` itself on the right side, its transpose on the left side), ``Q`` the basis and ``N`` a
direction::

    H: kept x compressed        R = H Q: kept x rank
    Q: compressed x rank        update of H = N Q^T

so a method is written once for both sides. A rank computes with the rows of ``Q`` and ``N`` that its elements touch
(*held*) and stores the rows that it owns (*owned*).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.layout import EMPTY, ContiguousPart, Part, Range, Rectangle, whole
from ds_lowrank.sharding.reduce import Program, Request, Route, all_reduce_route
from ds_lowrank.sharding.updates import Dense, Factors, NewWeights, Update

Side = Literal["left", "right"]


class MatrixShard:
    """One rank's part of one logical matrix.

    Args:
        name: the parameter's name; seeds derive from it.
        shape: the logical ``(m, n)``.
        parts: what each rank of the group holds.
        rank: this rank's position in the group.
        side: ``right`` compresses the columns, ``left`` the rows.
        root: the rank that runs this matrix's factorisations.
        block_rows: rows of the state that one rank owns together.
        peers: the ranks of the group that share this copy of the matrix; all of them, unless tensor-parallel ranks
            have one each.
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
        self.flat_gradient, self.weights = torch.empty(0), torch.empty(0)
        self._seen_as: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None
        self._counts = [part.numel for part in parts]
        self._axes: dict[Hashable, Axis] = {}
        self._everyone: dict[int, Route] = {}
        self._views: dict[tuple[int, int], MatrixShard] = {}

    def _axis(self, size: int, held: Sequence[Range]) -> Axis:
        return Axis(size, held, self._counts, self.root, self.rank, self.block_rows, self.peers)

    @cached_property
    def rows(self) -> Axis:
        return self._axis(self.shape[0], [part.rows for part in self.parts])

    @cached_property
    def columns(self) -> Axis:
        return self._axis(self.shape[1], [part.cols for part in self.parts])

    @cached_property
    def elements(self) -> Axis:
        """The elements themselves, one row each: every rank owns those it holds.

        They are numbered as in the row-major matrix; where a rank's are no interval of it, rank after rank.
        """
        intervals = [part.flat_interval(self.shape[1]) for part in self.parts]
        if None in intervals:
            ends = list(accumulate(self._counts))
            intervals = [(end - weight, end) for end, weight in zip(ends, self._counts, strict=True)]
        held = [interval for interval in intervals if interval is not None]
        return self._axis(sum(self._counts), held)

    @property
    def kept(self) -> Axis:
        """The dimension along which the moments lie."""
        return self.rows if self.side == "right" else self.columns

    @property
    def compressed(self) -> Axis:
        """The dimension that the basis compresses."""
        return self.columns if self.side == "right" else self.rows

    def grouped(self, every: int) -> Axis:
        """The kept dimension, ``every`` rows of it taken as one."""
        if every == 1:
            return self.kept
        if ("grouped", every) not in self._axes:
            ranges = [part.rows if self.side == "right" else part.cols for part in self.parts]
            held = [(lo // every, -(-hi // every)) for lo, hi in ranges]
            self._axes["grouped", every] = self._axis(self.kept.size // every, held)
        return self._axes["grouped", every]

    def replicated_axis(self, rows: int) -> Axis:
        """The rows of a small tensor that every rank with a part of the matrix has whole."""
        if rows not in self._axes:
            self._axes[rows] = self._axis(rows, [(0, rows) if weight else (0, 0) for weight in self._counts])
        return self._axes[rows]

    def replicated_sum(self, value: torch.Tensor) -> Program[torch.Tensor]:
        """Sum a small tensor over the ranks that hold the matrix; each of them gets the sum, the others zeros."""
        axis = self.replicated_axis(value.shape[0])
        own = yield axis.reduce_scatter(self.local_contribution(value))
        return self.or_zeros((yield axis.all_gather(own)), value.shape[0])

    def local_contribution(self, value: torch.Tensor) -> torch.Tensor:
        """A small tensor as this rank contributes it: no rows where the rank has no part of the matrix."""
        return value if self.part.numel else value[:0]

    def or_zeros(self, value: torch.Tensor, rows: int) -> torch.Tensor:
        """A small tensor to compute with: zeros where the rank has no part of the matrix and was sent none."""
        return value if self.part.numel else value.new_zeros(rows, value.shape[1])

    def all_reduce(self, value: torch.Tensor) -> Request:
        """Sum a few numbers, one a row, over all peers: each gets the same bits, so that all decide alike."""
        rows = value.shape[0]
        if rows not in self._everyone:
            self._everyone[rows] = all_reduce_route(len(self.parts), rows, self.peers)
        return Request(self._everyone[rows], value)

    def viewed(self, shape: tuple[int, int]) -> MatrixShard:
        """The same elements in the same storage as a matrix of another shape.

        Raises:
            ConfigError: tensor parallelism splits the matrix, so that the storage of a rank is not an interval of it.
        """
        if shape not in self._views:
            parts = [self._viewed_part(part, shape) for part in self.parts]
            self._views[shape] = MatrixShard(
                self.name, shape, parts, self.rank, self.side, self.root, self.block_rows, self.peers
            )
        view = self._views[shape]
        view.attach(self.flat_gradient, self.weights)
        return view

    def _viewed_part(self, part: Part, shape: tuple[int, int]) -> ContiguousPart:
        interval = part.flat_interval(self.shape[1])
        if interval is None:
            raise ConfigError(
                f"{self.name}: tensor parallelism splits its columns, so that it has no view of another shape; set "
                "left_view to 'transpose', or tensor_parallel_projection to 'local'"
            )
        return whole(shape, *interval) if part.numel else EMPTY

    def attach(self, flat: torch.Tensor, weights: torch.Tensor) -> None:
        """Take this step's gradient and the weights: the elements of this rank's part, ``part.numel`` of them."""
        self.flat_gradient, self.weights, self._seen_as = flat, weights, None

    def with_gradient(self, change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> None:
        """From now on ``gradient``, and every product with it, is of the changed gradient.

        Args:
            change: from the gradient's rectangles to others of their shapes, fp32. Called for each product, so that
                one matrix at a time is held twice.
        """
        self._seen_as = change

    def detach(self) -> None:
        """Let go of the gradient and the weights."""
        self.flat_gradient, self.weights = self.flat_gradient.new_empty(0), self.weights.new_empty(0)
        self._seen_as = None
        for view in self._views.values():
            view.detach()

    @property
    def device(self) -> torch.device:
        return self.flat_gradient.device

    @property
    def gradient(self) -> list[torch.Tensor]:
        """This step's gradient, one view a rectangle of this rank's part."""
        pieces = self.views(self.flat_gradient)
        return pieces if self._seen_as is None else self._seen_as(pieces)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The rectangles of this rank's part as views of its elements ``flat``."""
        return [flat[r.offset : r.offset + r.height * r.width].view(r.height, r.width) for r in self.part.rectangles]

    def times(self, basis: torch.Tensor) -> torch.Tensor:
        """This rank's part of ``H @ basis``.

        Args:
            basis: held compressed rows x k.

        Returns:
            held kept rows x k, fp32: what this rank's elements contribute.
        """
        return self._product(basis, from_columns=self.side == "right")

    def transposed_times(self, tall: torch.Tensor) -> torch.Tensor:
        """This rank's part of ``H^T @ tall``: held kept rows x k in, held compressed rows x k out."""
        return self._product(tall, from_columns=self.side == "left")

    def _product(self, factor: torch.Tensor, from_columns: bool) -> torch.Tensor:
        """``G @ factor`` (from columns to rows) or ``G^T @ factor``, over this rank's rectangles."""
        gradient = self.gradient
        if len(gradient) == 1:
            only = gradient[0].float()
            return (only if from_columns else only.T) @ factor
        (row0, row1), (col0, col1) = self.part.rows, self.part.cols
        result = factor.new_zeros(row1 - row0 if from_columns else col1 - col0, factor.shape[1])
        for rectangle, piece in zip(self.part.rectangles, gradient, strict=True):
            rows, cols = self.held_rows(rectangle), self.held_columns(rectangle)
            if from_columns:
                result[rows].addmm_(piece.float(), factor[cols])
            else:
                result[cols].addmm_(piece.float().T, factor[rows])
        return result

    def held_rows(self, rectangle: Rectangle) -> slice:
        """Where a rectangle's rows stand among the rows that this rank holds."""
        first = rectangle.row - self.part.rows[0]
        return slice(first, first + rectangle.height)

    def held_columns(self, rectangle: Rectangle) -> slice:
        """Where a rectangle's columns stand among the columns that this rank holds."""
        first = rectangle.col - self.part.cols[0]
        return slice(first, first + rectangle.width)

    def kept_of(self, rectangle: Rectangle, held: torch.Tensor) -> torch.Tensor:
        """The rows of a held kept x 1 tensor that belong to a rectangle, shaped to multiply it."""
        return self.along(self.kept, rectangle, held)

    def kept_squares(self, unit: float | torch.Tensor = 1.0) -> torch.Tensor:
        """This rank's part of the squared norms of the rows of ``H / unit``: held kept rows x 1, fp32."""
        return self.squares_along(self.kept, self.flat_gradient, unit)

    def row_squares(self, flat: torch.Tensor, unit: float | torch.Tensor = 1.0) -> torch.Tensor:
        """This rank's part of the squared norms of the rows of a matrix, over ``unit`` squared: held rows x 1, fp32.

        Args:
            flat: this rank's elements of the matrix.
            unit: about the size of an element, so that no square leaves the range of fp32.
        """
        sums = torch.zeros(self.part.rows[1] - self.part.rows[0], 1, device=flat.device)
        for rectangle, piece in zip(self.part.rectangles, self.views(flat), strict=True):
            sums[self.held_rows(rectangle)] += _squared_norms(piece, 1, unit).unsqueeze(1)
        return sums

    def column_squares(self, flat: torch.Tensor, unit: float | torch.Tensor = 1.0) -> torch.Tensor:
        """The same for the columns: held columns x 1."""
        sums = torch.zeros(self.part.cols[1] - self.part.cols[0], 1, device=flat.device)
        for rectangle, piece in zip(self.part.rectangles, self.views(flat), strict=True):
            sums[self.held_columns(rectangle)] += _squared_norms(piece, 0, unit).unsqueeze(1)
        return sums

    def along(self, axis: Axis, rectangle: Rectangle, held: torch.Tensor) -> torch.Tensor:
        """What a rectangle needs of a tensor along ``rows`` or ``columns``, held x 1, shaped to multiply it."""
        return held[self.held_rows(rectangle)] if axis is self.rows else held[self.held_columns(rectangle)].T

    def squares_along(self, axis: Axis, flat: torch.Tensor, unit: float | torch.Tensor = 1.0) -> torch.Tensor:
        """This rank's part of the squared norms of rows or columns, over ``unit`` squared: held x 1, fp32."""
        return self.row_squares(flat, unit) if axis is self.rows else self.column_squares(flat, unit)

    def dots_along(self, axis: Axis, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """This rank's part of the products of two matrices' rows (or columns) with each other: held x 1, fp32."""
        sums = torch.zeros(axis.held[1] - axis.held[0], 1, device=a.device)
        for rectangle, one, other in zip(self.part.rectangles, self.views(a), self.views(b), strict=True):
            product = one.float() * other.float()
            if axis is self.rows:
                sums[self.held_rows(rectangle)] += product.sum(1, keepdim=True)
            else:
                sums[self.held_columns(rectangle)] += product.sum(0).unsqueeze(1)
        return sums

    def block(self) -> torch.Tensor:
        """This rank's elements in the rows it holds of the whole matrix, zeros elsewhere: held rows x n, fp32."""
        row0, row1 = self.part.rows
        block = torch.zeros(row1 - row0, self.shape[1], device=self.device)
        for rectangle, piece in zip(self.part.rectangles, self.gradient, strict=True):
            block[self.held_rows(rectangle), rectangle.col : rectangle.col + rectangle.width] = piece
        return block

    def lifted(self, factors: Factors) -> torch.Tensor:
        """``kept @ compressed^T`` without its scale, on the elements this rank holds: flat, fp32."""
        flat = torch.empty(self.part.numel, device=factors.kept.device)
        for rectangle, piece in zip(self.part.rectangles, self.views(flat), strict=True):
            by_row, by_column = self._factors_of(rectangle, factors)
            torch.mm(by_row, by_column.T, out=piece)
        return flat

    def dense(self, update: Factors | Dense) -> torch.Tensor:
        """An update, its scale included, on the elements this rank holds: flat, fp32."""
        flat = update.make() if isinstance(update, Dense) else self.lifted(update)
        return flat * update.scale

    def _factors_of(self, rectangle: Rectangle, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        by_row, by_column = factors.kept, factors.compressed
        if self.side == "left":
            by_row, by_column = by_column, by_row
        return by_row[self.held_rows(rectangle)], by_column[self.held_columns(rectangle)]

    def write(self, flat: torch.Tensor, update: Update, lr: float, decay: float) -> None:
        """``W <- (1 - decay) W - lr * update`` on the elements this rank holds.

        Args:
            flat: the weights of this rank's part.
            update: the direction to descend along.
            lr: learning rate.
            decay: the decoupled weight decay of this step, ``lr * weight_decay``.
        """
        if not self.part.numel:
            return
        if isinstance(update, NewWeights):
            flat.copy_(update.make())
            return
        if isinstance(update, Dense):
            exact = flat.float()
            exact.mul_(1 - decay).sub_(update.make(), alpha=lr * update.scale)
            if exact is not flat:
                flat.copy_(exact)
            return
        for rectangle, weight in zip(self.part.rectangles, self.views(flat), strict=True):
            by_row, by_column = self._factors_of(rectangle, update)
            exact = weight.float()
            torch.addmm(exact, by_row, by_column.T, beta=1 - decay, alpha=-lr * update.scale, out=exact)
            if exact is not weight:
                weight.copy_(exact)


def _squared_norms(piece: torch.Tensor, dim: int, unit: float | torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(piece, dim=dim, dtype=torch.float64)
    return (norms / unit).square().view(-1).float()
