"""Weights in magnitude and direction: gradients of the directions, and what a step makes of their lengths.

Every unit of a weight matrix, a row or a column, is ``W = g v / |v|``; :mod:`ds_lowrank.methods.gradnormlorp` has the
equations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.elements import Elements, Piece
from ds_lowrank.sharding.elementwise import along, sum_of_squares
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Factors, NewWeights, RescaledWeights, Update


@dataclass(frozen=True)
class Frame:
    """What leads from W to v and from G to dL/dv, one number per unit.

    Attributes:
        g_over_v: ``g / |v|``: matrices x held units x 1, fp32.
        a: ``<G, W> / |W|^2``: matrices x held units x 1, fp32.
        v_over_w: ``sign(g) |v| / |W|``: matrices x held units x 1, fp32.
    """

    g_over_v: torch.Tensor
    a: torch.Tensor
    v_over_w: torch.Tensor


def gather_frame(axis: Axis, g_over_v: torch.Tensor, a: torch.Tensor, v_over_w: torch.Tensor) -> Program[Frame]:
    """The frame on the held units from its three columns on the owned ones, by one all_gather."""
    held = yield axis.all_gather(torch.cat([g_over_v, a, v_over_w], dim=2))
    return Frame(*held.split(1, dim=2))


class Tangent(MatrixShard):
    """The stack whose gradients are ``dL/dv = g / |v| * (G - a W)``, which are not formed to be multiplied.

    Args:
        shard: the stack with the gradients ``G`` and the weights ``W``.
        axis: its units, of which each has a magnitude.
        frame: on the units that this rank holds.
    """

    def __init__(self, shard: MatrixShard, axis: Axis, frame: Frame) -> None:
        self.__dict__.update(shard.__dict__)  # the same axes, gradients and weights
        self._units, self._frame = axis, frame

    def product(self, elements: Elements, factor: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """``dL/dv @ factor``, or ``(dL/dv)^T @ factor``, from the products of ``G`` and ``W``."""
        is_summed_over = (self._units is self.kept) == transposed  # what the units are along
        scaled = self._frame.g_over_v * factor if is_summed_over else factor
        return self._of_directions(super().product(elements, scaled, transposed), scaled, transposed)

    def times(self, basis: torch.Tensor) -> torch.Tensor:
        """``dL/dv @ basis``, also where backward has multiplied ``G`` by it already."""
        if self.sums is None:
            return self.product(self.gradient, basis)
        scaled = self._frame.g_over_v * basis if self._units is self.compressed else basis
        return self._of_directions(self.sums[0], scaled, transposed=False)

    def _of_directions(self, of_gradient: torch.Tensor, scaled: torch.Tensor, transposed: bool) -> torch.Tensor:
        """The product with ``dL/dv``, from that of ``G`` with the same factor, which is changed in place."""
        scale, a = self._frame.g_over_v, self._frame.a
        if (self._units is self.kept) == transposed:
            return of_gradient.sub_(self.once(super().product(self.weights, a * scaled, transposed)))
        return of_gradient.sub_(a * self.once(super().product(self.weights, scaled, transposed))).mul_(scale)

    def dense_gradient(self, piece: Piece) -> torch.Tensor:
        """``dL/dv`` where a piece of the gradient is."""
        weights = self.weights.values_at(piece).float()
        scale, a = (along(self, self._units, piece, numbers) for numbers in (self._frame.g_over_v, self._frame.a))
        return (piece.values.float() - a * self.once(weights)).mul_(scale)


class MovedDirections:
    """The new directions ``v - lr * scale * N Q^T`` of a stack, with ``v`` decayed, as they are before any is formed.

    Args:
        shard: the stack, with the weights ``W``.
        axis: its units.
        lift: ``scale * N Q^T``.
        frame: leads from ``W`` to ``v``, on the units that this rank holds.
        weight_squares: this rank's contribution to ``|W|^2``: matrices x held units x 1, fp32.
        kept: the share of ``v`` that weight decay leaves.
        lr: the learning rate.
    """

    def __init__(
        self,
        shard: MatrixShard,
        axis: Axis,
        lift: Factors | Dense,
        frame: Frame,
        weight_squares: torch.Tensor,
        kept: float,
        lr: float,
    ) -> None:
        self._shard, self._axis, self._lift, self._lr = shard, axis, lift, lr
        self._stretch, self._weight_squares = frame.v_over_w * kept, weight_squares
        # With factors, lengths and products are had from small matrices. A part of several rectangles, weights that
        # are rounded, and the sign of a lifted matrix are formed piece by piece.
        is_whole = shard.weights.singles is not None or not shard.part.numel
        self._factors = lift if isinstance(lift, Factors) and is_whole else None

    def squared_lengths(self) -> torch.Tensor:
        """This rank's contribution to ``|v|^2``: matrices x held units x 1, fp32.

        With ``v = s W - c A B^T`` and ``A`` along the units: ``|v|^2 = s^2 |W|^2 - 2 c s A (W B) + c^2 A (B^T B) A^T``.
        """
        shard, axis, factors = self._shard, self._axis, self._factors
        if factors is None:
            pieces = (piece._replace(values=self._dense(piece)) for piece in shard.weights.dense_pieces)
            return sum_of_squares(shard, axis, pieces)
        a, b = (factors.kept, factors.compressed) if axis is shard.kept else (factors.compressed, factors.kept)
        c = self._lr * factors.scale
        products = shard.product(shard.weights, b, transposed=axis is not shard.kept)  # W B
        quadratic = ((a @ (b.mT @ b)).double() * a).sum(2, keepdim=True)
        mixed = (products.double() * a).sum(2, keepdim=True) * self._stretch
        return (self._stretch.double().square() * self._weight_squares - 2 * c * mixed + c * c * quadratic).float()

    def of_lengths(self, g_over_v: torch.Tensor) -> Update:
        """The weights ``g v / |v|``.

        Args:
            g_over_v: ``g / |v|`` of the new directions: matrices x held units x 1, fp32.
        """
        shard, axis, factors = self._shard, self._axis, self._factors
        if factors is None:
            return NewWeights(lambda piece: self._dense(piece).mul_(along(shard, axis, piece, g_over_v)))
        of_units = g_over_v * (self._lr * factors.scale)
        kept, compressed = factors.kept, factors.compressed
        if axis is shard.kept:
            kept = kept * of_units
        else:
            compressed = compressed * of_units
        return RescaledWeights(axis, self._stretch * g_over_v, kept, compressed)

    def _dense(self, piece: Piece) -> torch.Tensor:
        """The new directions where a piece of the weights is: matrices x rows x columns, fp32."""
        step = self._lift.dense(self._shard, piece).mul_(-self._lr)
        return step.addcmul_(piece.values.float(), along(self._shard, self._axis, piece, self._stretch))
