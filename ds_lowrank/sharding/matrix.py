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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from ds_lowrank.sharding.layout import Part, Range, Spans, deal, length
from ds_lowrank.sharding.reduce import Program, Request, Route

Side = Literal["left", "right"]


class Axis:
    """The rows of a tall tensor (a basis, a projection) along one dimension of a matrix, and how they travel.

    Args:
        size: the length of the dimension.
        held: for each rank the range its elements touch.
        weights: for each rank how many elements it holds.
        factor_rank: the rank that factors this matrix.
        rank: this rank.
    """

    def __init__(self, size: int, held: Sequence[Range], weights: Sequence[int], factor_rank: int, rank: int) -> None:
        self.size, self.rank = size, rank
        self.held = held[rank]
        touched: tuple[Spans, ...] = tuple((span,) if span[0] < span[1] else () for span in held)
        owned = deal(held, weights)
        at_factor: tuple[Spans, ...] = tuple(((0, size),) if i == factor_rank else () for i in range(len(held)))
        self.owned = owned[rank]
        self._reduce = Route(touched, owned)
        self._gather = Route(owned, touched)
        self._collect = Route(owned, at_factor)
        self._sum = Route(touched, at_factor)
        self._hand_out = Route(at_factor, owned)

    @property
    def owned_rows(self) -> int:
        return length(self.owned)

    def reduce(self, held: torch.Tensor) -> Request:
        """Sum what every rank computed for the rows it holds; the answer is the rows this rank owns."""
        return Request(self._reduce, held)

    def gather(self, owned: torch.Tensor) -> Request:
        """The rows this rank holds, each from its owner."""
        return Request(self._gather, owned)

    def collect(self, owned: torch.Tensor) -> Request:
        """All rows on the factoring rank, none elsewhere."""
        return Request(self._collect, owned)

    def sum_at_factor(self, held: torch.Tensor) -> Request:
        """All rows on the factoring rank, summed over the ranks that hold parts of them; none elsewhere."""
        return Request(self._sum, held)

    def hand_out(self, everything: torch.Tensor) -> Request:
        """The rows this rank owns, from the factoring rank (the others pass a tensor of no rows)."""
        return Request(self._hand_out, everything)


@dataclass(frozen=True)
class Factors:
    """An update ``scale * kept @ compressed^T``, in the rows this rank holds."""

    kept: torch.Tensor
    compressed: torch.Tensor
    scale: float


class MatrixShard:
    """One rank's part of one logical matrix.

    Args:
        name: the parameter's name; seeds derive from it.
        shape: the logical ``(m, n)``.
        parts: what each rank of the group holds.
        rank: this rank's position in the group.
        side: ``right`` compresses the columns, ``left`` the rows.
        factor_rank: the rank that runs this matrix's factorisations.
    """

    def __init__(
        self, name: str, shape: tuple[int, int], parts: Sequence[Part], rank: int, side: Side, factor_rank: int
    ) -> None:
        self.name, self.shape, self.side, self.rank = name, shape, side, rank
        self.factor_rank, self.parts = factor_rank, tuple(parts)
        self.part = parts[rank]
        self.gradient: list[torch.Tensor] = []
        self.device = torch.device("cpu")
        self._weights = [part.numel for part in parts]
        self._totals: dict[int, Axis] = {}

    @cached_property
    def rows(self) -> Axis:
        held = [part.rows for part in self.parts]
        return Axis(self.shape[0], held, self._weights, self.factor_rank, self.rank)

    @cached_property
    def columns(self) -> Axis:
        held = [part.cols for part in self.parts]
        return Axis(self.shape[1], held, self._weights, self.factor_rank, self.rank)

    @property
    def kept(self) -> Axis:
        """The dimension along which the moments lie."""
        return self.rows if self.side == "right" else self.columns

    @property
    def compressed(self) -> Axis:
        """The dimension that the basis compresses."""
        return self.columns if self.side == "right" else self.rows

    def total(self, value: torch.Tensor) -> Program[torch.Tensor]:
        """Sum a small tensor over the ranks that hold the matrix; each of them gets the sum, the others zeros."""
        if value.shape[0] not in self._totals:
            held = [(0, value.shape[0]) if weight else (0, 0) for weight in self._weights]
            self._totals[value.shape[0]] = Axis(value.shape[0], held, self._weights, self.factor_rank, self.rank)
        axis = self._totals[value.shape[0]]
        own = yield axis.reduce(value if self.part.numel else value[:0])
        total = yield axis.gather(own)
        return total if self.part.numel else torch.zeros_like(value)

    def attach(self, flat: torch.Tensor) -> None:
        """Take this step's gradient: the elements of this rank's part, ``part.numel`` of them."""
        self.gradient, self.device = self.views(flat), flat.device

    def detach(self) -> None:
        """Let go of the gradient."""
        self.gradient = []

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
        (row0, row1), (col0, col1) = self.part.rows, self.part.cols
        size = row1 - row0 if from_columns else col1 - col0
        if len(self.gradient) == 1:
            only = self.gradient[0].float()
            return (only if from_columns else only.T) @ factor
        result = factor.new_zeros(size, factor.shape[1])
        for rectangle, piece in zip(self.part.rectangles, self.gradient, strict=True):
            rows = slice(rectangle.row - row0, rectangle.row - row0 + rectangle.height)
            cols = slice(rectangle.col - col0, rectangle.col - col0 + rectangle.width)
            if from_columns:
                result[rows].addmm_(piece.float(), factor[cols])
            else:
                result[cols].addmm_(piece.float().T, factor[rows])
        return result

    def block(self) -> torch.Tensor:
        """This rank's elements in the rows it holds of the whole matrix, zeros elsewhere: held rows x n, fp32."""
        row0, row1 = self.part.rows
        block = torch.zeros(row1 - row0, self.shape[1], device=self.device)
        for rectangle, piece in zip(self.part.rectangles, self.gradient, strict=True):
            rows = slice(rectangle.row - row0, rectangle.row - row0 + rectangle.height)
            block[rows, rectangle.col : rectangle.col + rectangle.width] = piece
        return block

    def write(self, flat: torch.Tensor, update: Factors, lr: float, decay: float) -> None:
        """``W <- (1 - decay) W - lr * update`` on the elements this rank holds, in one pass.

        Args:
            flat: the weights of this rank's part.
            update: the direction to descend along, as two factors.
            lr: learning rate.
            decay: the decoupled weight decay of this step, ``lr * weight_decay``.
        """
        row0, col0 = self.part.rows[0], self.part.cols[0]
        by_row, by_col = update.kept, update.compressed
        if self.side == "left":
            by_row, by_col = by_col, by_row
        for rectangle, weight in zip(self.part.rectangles, self.views(flat), strict=True):
            a = by_row[rectangle.row - row0 : rectangle.row - row0 + rectangle.height]
            b = by_col[rectangle.col - col0 : rectangle.col - col0 + rectangle.width]
            exact = weight if weight.dtype == torch.float32 else weight.float()
            torch.addmm(exact, a, b.T, beta=1 - decay, alpha=-lr * update.scale, out=exact)
            if exact is not weight:
                weight.copy_(exact)


def everyone(ranks: int, rows: int) -> Route:
    """Every rank has all rows and wants their sum. For small tensors: each rank sends all of it to every other."""
    spans: tuple[Spans, ...] = (((0, rows),),) * ranks
    return Route(spans, spans)
