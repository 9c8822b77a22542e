"""What a method sees of the matrices it steps: their axes, products with their gradients, and sums over ranks.

Matrices that are cut alike are stepped together, as a *stack*. Every tensor of a method has a leading dimension for the
matrices of the stack. A method compresses one dimension of the gradient and keeps the other. Let ``H`` be the gradient
oriented so that the kept dimension comes first (``G`` itself on the right side, its transpose on the left side), ``Q``
the basis and ``N`` a direction; for each matrix of the stack::

    H: kept x compressed        R = H Q: kept x rank
    Q: compressed x rank        update of H = N Q^T

A method is therefore written once for both sides. A rank computes with the rows of ``Q`` and ``N`` that its elements
touch (*held* rows) and stores the rows that it owns (*owned* rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ds_lowrank.sharding.axis import Axis, AxisLayout
from ds_lowrank.sharding.elements import Elements, Piece, Rounding
from ds_lowrank.sharding.geometry import Geometry, Side
from ds_lowrank.sharding.layout import Part, Rectangle
from ds_lowrank.sharding.precision import MatmulPrecision, products_in
from ds_lowrank.sharding.requests import Program, Request
from ds_lowrank.sharding.route import SumRoute, sum_route

__all__ = ["MatrixShard", "Member", "Side", "Sums", "shard_of"]


Sums = tuple[torch.Tensor, ...]
"""Quantities that are linear in a gradient, each with a leading dimension for the matrices of a stack."""


class Member(NamedTuple):
    """One matrix of a stack.

    Attributes:
        name: the parameter's name; seeds derive from it.
        root: the rank that runs its factorizations.
        number: identifies it among all matrices that are stepped together, on all ranks.
    """

    name: str
    root: int = 0
    number: int = 0


class MatrixShard:
    """One rank's part of every matrix in a stack, with this step's gradients and weights.

    Args:
        geometry: how each of them is cut.
        members: the matrices.

    Attributes:
        gradient: this rank's elements of the gradients; none between steps.
        weights: this rank's elements of the weights; none between steps.
        sums: what a method's ``measure`` found of the gradients of all micro-batches, where these were not kept; None
            where the gradients are attached.
        is_accumulated: whether there are such sums on the ranks that hold the matrices.
        precision: in which a card multiplies with gradients and weights; None for torch's setting.
        rounding: how this step rounds new weights in bf16; None for to the nearest.
        held_basis: a basis that a method keeps gathered, for as long as the stack consists of the same matrices:
            matrices x held compressed rows x k, fp32. None if it is not kept, or has to be gathered again.
        is_basis_new: whether :attr:`held_basis` is one that the next step takes up, and not that of the states.
        views: the same matrices viewed in other shapes, by shape.
    """

    def __init__(self, geometry: Geometry, members: Sequence[Member]) -> None:
        self.geometry, self.members = geometry, tuple(members)
        self.names = tuple(member.name for member in members)
        self.rooted = tuple(i for i, member in enumerate(members) if member.root == geometry.rank)
        self.gradient = self.weights = Elements([], [], geometry.part.rectangles)
        self.sums: Sums | None = None
        self.is_accumulated = False
        self.precision: MatmulPrecision | None = None
        self.rounding: Rounding | None = None
        self.held_basis: torch.Tensor | None = None
        self.is_basis_new = False
        self.views: dict[tuple[int, int], MatrixShard] = {}
        self._axes: dict[int, Axis] = {}
        self._sums: SumRoute | None = None
        self._device = torch.device("cpu")

    def of_rooted(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what a tensor with a leading dimension for the matrices has of those whose root this rank is."""
        return tensor[torch.tensor(self.rooted, dtype=torch.int64, device=tensor.device)]

    def attach(
        self,
        gradient: Sequence[torch.Tensor] | None,
        weights: Sequence[torch.Tensor],
        sizes: Sequence[int] | None = None,
    ) -> None:
        """Attach this rank's elements of the gradients and the weights for one step.

        Args:
            gradient: runs of consecutive matrices, as :class:`Elements` takes them, together all of the stack in order;
                None where only weights are looked at, or :attr:`sums` are all there is.
            weights: likewise; updated in place.
            sizes: how many matrices each run has; None for one.
        """
        rectangles, sizes = self.geometry.part.rectangles, [1] * len(weights) if sizes is None else sizes
        self.gradient = Elements([], [], rectangles) if gradient is None else Elements(gradient, sizes, rectangles)
        self.weights = Elements(weights, sizes, rectangles)
        self._device = weights[0].device

    def detach(self) -> None:
        """Release the gradients and the weights at the end of a step, also those of the views."""
        self.gradient = self.weights = Elements([], [], self.geometry.part.rectangles)
        self.sums = None
        for view in self.views.values():
            view.detach()

    def __len__(self) -> int:
        """The number of matrices."""
        return len(self.members)

    @property
    def shape(self) -> tuple[int, int]:
        """The logical ``(m, n)`` of each matrix."""
        return self.geometry.shape

    @property
    def side(self) -> Side:
        """The side that is compressed."""
        return self.geometry.side

    @property
    def transposed(self) -> bool:
        """Whether the layers store the matrices input x output."""
        return self.geometry.transposed

    @property
    def part(self) -> Part:
        """What this rank holds of each matrix."""
        return self.geometry.part

    @property
    def device(self) -> torch.device:
        """The device of the gradient."""
        return self._device

    def axis(self, layout: AxisLayout) -> Axis:
        """An axis of these matrices.

        Args:
            layout: an axis of their geometry.
        """
        found = self._axes.get(id(layout))
        if found is None:
            roots = [member.root for member in self.members]
            found = self._axes[id(layout)] = Axis(layout, self.geometry.rank, roots)
        return found

    @property
    def rows(self) -> Axis:
        """The rows of the matrices, as an axis."""
        return self.axis(self.geometry.rows)

    @property
    def columns(self) -> Axis:
        """The columns of the matrices, as an axis."""
        return self.axis(self.geometry.columns)

    @property
    def elements(self) -> Axis:
        """The elements of the matrices, as an axis of one row each."""
        return self.axis(self.geometry.elements)

    @property
    def kept(self) -> Axis:
        """The dimension that is not compressed: the rows of ``H`` and of the moments."""
        return self.axis(self.geometry.kept)

    @property
    def compressed(self) -> Axis:
        """The dimension that is compressed: the columns of ``H``, the rows of the basis."""
        return self.axis(self.geometry.compressed)

    def replicated_axis(self, rows: int) -> Axis:
        """The axis of a small tensor that every rank with a part of the matrix holds whole.

        Args:
            rows: number of rows of the tensor.
        """
        return self.axis(self.geometry.replicated(rows))

    def replicated_sum(self, value: torch.Tensor) -> Program[torch.Tensor]:
        """Sum a small tensor over the ranks that hold the matrix: a reduce_scatter and an all_gather.

        Args:
            value: matrices x rows x columns, fp32: what this rank contributes.

        Returns:
            A program whose result is the sum: matrices x rows x columns, fp32; zeros on a rank without a part.
        """
        axis = self.replicated_axis(value.shape[1])
        own = yield axis.reduce_scatter(self.local_contribution(value))
        return self.or_zeros((yield axis.all_gather(own)), value.shape[1])

    def local_contribution(self, value: torch.Tensor) -> torch.Tensor:
        """What this rank contributes to the sum of a small tensor: no rows if it has no part of the matrix.

        Args:
            value: matrices x rows x columns.
        """
        return value if self.part.numel else value[:, :0]

    def or_zeros(self, value: torch.Tensor, rows: int) -> torch.Tensor:
        """A small tensor that was gathered, or zeros if this rank has no part of the matrix and was sent no rows.

        Args:
            value: matrices x rows x columns, or matrices x 0 x columns.
            rows: number of rows of the result.
        """
        return value if self.part.numel else value.new_zeros(value.shape[0], rows, value.shape[2])

    def once(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's share of what every rank with the same elements computes of the weights, so that it counts once.

        Args:
            value: any shape, fp32.
        """
        return value if self.geometry.copies == 1 else value / self.geometry.copies

    def all_reduce(self, value: torch.Tensor) -> Request:
        """Sum a few numbers of each matrix over all peers. Each gets the same bits, so that all decide alike.

        Args:
            value: matrices x count x k, any floating dtype.

        Returns:
            A request whose answer is matrices x count x k, fp32.
        """
        if self._sums is None:
            self._sums = sum_route(tuple(member.number for member in self.members), self.geometry.peers)
        return Request(self._sums, value)

    def times(self, basis: torch.Tensor) -> torch.Tensor:
        """This rank's contribution to ``H @ basis``: the first of :attr:`sums` where backward has multiplied already.

        Args:
            basis: matrices x held compressed rows x k, fp32.

        Returns:
            matrices x held kept rows x k, fp32.
        """
        return self.product(self.gradient, basis) if self.sums is None else self.sums[0]

    def transposed_times(self, tall: torch.Tensor) -> torch.Tensor:
        """This rank's contribution to ``H^T @ tall``.

        Args:
            tall: matrices x held kept rows x k, fp32.

        Returns:
            matrices x held compressed rows x k, fp32.
        """
        return self.product(self.gradient, tall, transposed=True)

    def dense_gradient(self, piece: Piece) -> torch.Tensor:
        """The gradients where a piece of :attr:`gradient` is, for a factorization of whole matrices.

        Args:
            piece: of the gradient.
        """
        return piece.values

    def product(self, elements: Elements, factor: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """This rank's contribution to ``X @ factor``, or to ``X^T @ factor``.

        Args:
            elements: of matrices ``X`` oriented like ``H``, any floating dtype.
            factor: matrices x held compressed (transposed: kept) rows x k, fp32.
            transposed: whether the transposes are multiplied.

        Returns:
            matrices x held kept (transposed: compressed) rows x k, fp32.
        """
        by_columns = (self.side == "right") != transposed
        held = (self.columns if by_columns else self.rows).held, (self.rows if by_columns else self.columns).held
        with products_in(self.precision, factor.device):
            return elements.times(factor, *held, transposed=not by_columns)

    def held(self, axis: Axis, rectangle: Rectangle) -> slice:
        """The rows (or columns) of a rectangle, counted from the first one that this rank holds.

        Args:
            axis: :attr:`rows` or :attr:`columns`.
            rectangle: of this rank's part.
        """
        if axis is self.rows:
            first = rectangle.row - axis.held[0]
            return slice(first, first + rectangle.height)
        first = rectangle.col - axis.held[0]
        return slice(first, first + rectangle.width)


def shard_of(
    name: str, geometry: Geometry, gradient: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> MatrixShard:
    """A stack of one matrix.

    Args:
        name: of the matrix.
        geometry: how it is cut; its first holder is the root.
        gradient: this rank's elements of the gradient, flat, any floating dtype; None for none yet.
        weights: this rank's elements of the weights, likewise; None for the gradient's.
    """
    shard = MatrixShard(geometry, [Member(name, geometry.holders[0])])
    if gradient is not None:
        shard.attach([gradient], [gradient if weights is None else weights])
    return shard
