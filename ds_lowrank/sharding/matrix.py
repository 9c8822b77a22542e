"""What a method sees of one matrix: its axes, products with its gradient, and the sums over ranks it may request.

A method compresses one dimension of the gradient and keeps the other. Let ``H`` be the gradient oriented so that the
kept dimension comes first (``G`` itself on the right side, its transpose on the left side), ``Q`` the basis and ``N`` a
direction::

    H: kept x compressed        R = H Q: kept x rank
    Q: compressed x rank        update of H = N Q^T

A method is therefore written once for both sides. A rank computes with the rows of ``Q`` and ``N`` that its elements
touch (*held* rows) and stores the rows that it owns (*owned* rows).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.matrix_axes import MatrixAxes, Side

__all__ = ["MatrixShard", "Side"]


class MatrixShard(MatrixAxes):
    """One rank's part of one logical matrix, with this step's gradient and weights.

    The arguments are those of :class:`MatrixAxes`.

    Attributes:
        weights: the weights of this rank's elements, flat; empty between steps.
        transposed: whether the layer stores the matrix input x output, so that its columns are the output units.
    """

    weights: torch.Tensor = torch.empty(0, dtype=torch.float32, device="cpu")
    transposed: bool = False
    _flat: torch.Tensor = torch.empty(0, dtype=torch.float32, device="cpu")
    _change: Callable[[torch.Tensor], torch.Tensor] | None = None

    def attach(self, flat_gradient: torch.Tensor, weights: torch.Tensor) -> None:
        """Attach this rank's elements of the gradient and the weights for one step.

        Args:
            flat_gradient: ``part.numel`` elements in storage order, flat, any floating dtype.
            weights: as many, any floating dtype; updated in place.
        """
        self._flat, self.weights = flat_gradient, weights

    def detach(self) -> None:
        """Release the gradient and the weights at the end of a step."""
        self._flat, self.weights = self._flat.new_empty(0), self.weights.new_empty(0)

    def with_gradient(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MatrixShard:
        """Copy this shard, with another gradient; this one is not changed.

        Args:
            change: maps the flat gradient to another one, fp32. It is called for each product, so that only one
                changed gradient at a time is in memory.
        """
        _ = self.rows, self.columns  # computed before the copy, so that both shards have the same axes
        shard = copy.copy(self)
        shard._change = change
        return shard

    @property
    def device(self) -> torch.device:
        """The device of the gradient."""
        return self._flat.device

    @property
    def flat_gradient(self) -> torch.Tensor:
        """This step's gradient on this rank's elements, flat; empty between steps."""
        return self._flat if self._change is None else self._change(self._flat)

    @property
    def gradient(self) -> list[torch.Tensor]:
        """This step's gradient, one view per rectangle of this rank's part."""
        return self.views(self.flat_gradient)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """View this rank's elements of a matrix as one 2-D tensor per rectangle.

        Args:
            flat: ``part.numel`` elements in storage order, any dtype.
        """
        return [flat[r.offset : r.offset + r.height * r.width].view(r.height, r.width) for r in self.part.rectangles]

    def times(self, basis: torch.Tensor) -> torch.Tensor:
        """This rank's contribution to ``H @ basis``.

        Args:
            basis: held compressed rows x k, fp32.

        Returns:
            held kept rows x k, fp32.
        """
        return self._product(basis, from_columns=self.side == "right")

    def transposed_times(self, tall: torch.Tensor) -> torch.Tensor:
        """This rank's contribution to ``H^T @ tall``.

        Args:
            tall: held kept rows x k, fp32.

        Returns:
            held compressed rows x k, fp32.
        """
        return self._product(tall, from_columns=self.side == "left")

    def _product(self, factor: torch.Tensor, from_columns: bool) -> torch.Tensor:
        """Compute ``G @ factor`` (from columns to rows) or ``G^T @ factor`` over this rank's rectangles."""
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
        """The rows of a rectangle, counted from the first row that this rank holds."""
        first = rectangle.row - self.part.rows[0]
        return slice(first, first + rectangle.height)

    def held_columns(self, rectangle: Rectangle) -> slice:
        """The columns of a rectangle, counted from the first column that this rank holds."""
        first = rectangle.col - self.part.cols[0]
        return slice(first, first + rectangle.width)

    def scaled(self, axis: Axis, factors: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """Multiply each row (or column) of a matrix by a factor: ``diag(s) X``, or ``X diag(s)``.

        Args:
            axis: :attr:`rows` or :attr:`columns`.
            factors: held rows of the axis x 1, fp32.
            flat: this rank's elements of the matrix, any floating dtype.

        Returns:
            This rank's elements of the product: flat, fp32.
        """
        result = torch.empty(self.part.numel, dtype=torch.float32, device=flat.device)
        for rectangle, piece, out in zip(self.part.rectangles, self.views(flat), self.views(result), strict=True):
            torch.mul(piece, self._along(axis, rectangle, factors), out=out)
        return result

    def outer(self, by_row: torch.Tensor, by_column: torch.Tensor) -> torch.Tensor:
        """This rank's elements of the outer product of two vectors, one along the rows and one along the columns.

        Args:
            by_row: held rows x 1, fp32.
            by_column: held columns x 1, fp32.

        Returns:
            The elements: flat, fp32.
        """
        result = torch.empty(self.part.numel, dtype=torch.float32, device=by_row.device)
        for rectangle, out in zip(self.part.rectangles, self.views(result), strict=True):
            torch.mul(by_row[self.held_rows(rectangle)], by_column[self.held_columns(rectangle)].T, out=out)
        return result

    def elements_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Select this rank's elements of a whole matrix: flat, same dtype.

        Args:
            whole: m x n.
        """
        pieces = [whole[r.row : r.row + r.height, r.col : r.col + r.width].reshape(-1) for r in self.part.rectangles]
        return torch.cat([whole.new_empty(0), *pieces])

    def squared_norms(self, axis: Axis, flat: torch.Tensor, safe_scale: float | torch.Tensor = 1.0) -> torch.Tensor:
        """This rank's contribution to the squared norms of a matrix's rows (or columns).

        Args:
            axis: :attr:`rows` or :attr:`columns`.
            flat: this rank's elements of the matrix, any floating dtype.
            safe_scale: divides the norms before they are squared, so that no square leaves the range of fp32.

        Returns:
            held rows of the axis x 1, fp32.
        """
        sums = torch.zeros(axis.held[1] - axis.held[0], 1, dtype=torch.float32, device=flat.device)
        for rectangle, piece in zip(self.part.rectangles, self.views(flat), strict=True):
            norms = torch.linalg.vector_norm(piece, dim=1 if axis is self.rows else 0, dtype=torch.float64)
            sums[self._held(axis, rectangle)] += (norms / safe_scale).square().float().view(-1, 1)
        return sums

    def dots(self, axis: Axis, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """This rank's contribution to the inner products of two matrices' rows (or columns).

        Args:
            axis: :attr:`rows` or :attr:`columns`.
            a: this rank's elements of one matrix, flat, any floating dtype.
            b: this rank's elements of the other matrix, flat, any floating dtype.

        Returns:
            held rows of the axis x 1, fp32.
        """
        sums = torch.zeros(axis.held[1] - axis.held[0], 1, dtype=torch.float32, device=a.device)
        for rectangle, one, other in zip(self.part.rectangles, self.views(a), self.views(b), strict=True):
            product = one.float() * other.float()
            sums[self._held(axis, rectangle)] += product.sum(1 if axis is self.rows else 0).unsqueeze(1)
        return sums

    def _held(self, axis: Axis, rectangle: Rectangle) -> slice:
        """The rows (or columns) of a rectangle, counted from the first one that this rank holds."""
        return self.held_rows(rectangle) if axis is self.rows else self.held_columns(rectangle)

    def _along(self, axis: Axis, rectangle: Rectangle, held: torch.Tensor) -> torch.Tensor:
        """The entries of a held rows x 1 tensor that belong to a rectangle, shaped to multiply it."""
        piece = held[self._held(axis, rectangle)]
        return piece if axis is self.rows else piece.T

    def block(self) -> torch.Tensor:
        """The rows of the gradient that this rank holds, with zeros for other ranks' elements: held rows x n, fp32."""
        row0, row1 = self.part.rows
        block = torch.zeros(row1 - row0, self.shape[1], dtype=torch.float32, device=self.device)
        for rectangle, piece in zip(self.part.rectangles, self.gradient, strict=True):
            block[self.held_rows(rectangle), rectangle.col : rectangle.col + rectangle.width] = piece
        return block
