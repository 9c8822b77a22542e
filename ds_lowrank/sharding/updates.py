"""The forms in which a method returns its update, and how each is written into a rank's weights.

The optimizer's rule is ``W <- (1 - decay) W - lr * update``, on the elements that this rank holds, for every matrix of
a stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.elementwise import along
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.rounding import changed, write


class Update(ABC):
    """What a method returns for the matrices of a stack: a direction to descend along, or the new weights."""

    @abstractmethod
    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """Step ``shard.weights`` in place.

        Args:
            shard: the stack. Its weights have any floating dtype; the arithmetic is fp32, rounded once.
            lr: the effective learning rate of this step.
            decay: the decoupled weight decay of this step, ``lr * weight_decay``.
        """


@dataclass(frozen=True)
class Factors(Update):
    """The update ``scale * kept @ compressed^T``, never formed as a whole matrix.

    Attributes:
        kept: matrices x held kept rows x k, fp32.
        compressed: matrices x held compressed rows x k, fp32.
        scale: factor on the product.
    """

    kept: torch.Tensor
    compressed: torch.Tensor
    scale: float

    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """Decay each piece of the weights and subtract the product from it, in one ``baddbmm``."""
        by_row, by_column = self._by_dimension(shard)
        if (singles := shard.weights.singles) is not None:
            for weight, rows, columns in zip(singles, by_row.unbind(), by_column.mT.unbind(), strict=True):
                weight.addmm_(rows, columns, beta=1 - decay, alpha=-lr * self.scale)
            return
        for piece in shard.weights.changed_pieces:
            rows, columns = self._of(shard, piece)
            with changed(shard, piece) as fp32:
                fp32.baddbmm_(rows, columns.mT, beta=1 - decay, alpha=-lr * self.scale)

    def lifted(self, shard: MatrixShard, piece: Piece) -> torch.Tensor:
        """The product ``kept @ compressed^T`` without its scale, where a piece is: matrices x rows x columns, fp32."""
        rows, columns = self._of(shard, piece)
        return torch.bmm(rows, columns.mT)

    def dense(self, shard: MatrixShard, piece: Piece) -> torch.Tensor:
        """The update, scale included, where a piece is: matrices x rows x columns, fp32."""
        return self.lifted(shard, piece).mul_(self.scale)

    def _by_dimension(self, shard: MatrixShard) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor along the rows of the matrices, and that along their columns."""
        return (self.kept, self.compressed) if shard.side == "right" else (self.compressed, self.kept)

    def _of(self, shard: MatrixShard, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of both factors that belong to a piece: that of its rows, then that of its columns."""
        by_row, by_column = self._by_dimension(shard)
        rows, columns = shard.held(shard.rows, piece.rectangle), shard.held(shard.columns, piece.rectangle)
        return by_row[piece.matrices, rows], by_column[piece.matrices, columns]


@dataclass(frozen=True)
class ScaledGradient(Update):
    """The update ``scale * diag(factors) H``: the gradient with a factor for each kept row.

    Attributes:
        factors: matrices x held kept rows x 1, fp32.
        scales: one for each matrix; with the factors it could leave the range of fp32.
    """

    factors: torch.Tensor
    scales: Sequence[float]

    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """Decay the weights and subtract the scaled gradient from them, matrix by matrix."""
        weights_of, gradients = shard.weights.singles, shard.gradient.singles
        if weights_of is not None and gradients is not None:
            if decay:
                torch._foreach_mul_(weights_of, 1 - decay)
            by_matrix = (self.factors if shard.side == "right" else self.factors.mT).unbind()
            for w, g, factor, scale in zip(weights_of, gradients, by_matrix, self.scales, strict=True):
                w.addcmul_(g, factor, value=-lr * scale)
            return
        for weights, gradient in zip(shard.weights.pieces, shard.gradient.pieces, strict=True):
            factors = along(shard, shard.kept, weights, self.factors)
            for i, scale in enumerate(self.scales[weights.matrices]):
                number, own = weights.matrices.start + i, slice(i, i + 1)
                piece = Piece(slice(number, number + 1), weights.rectangle, weights.values[own])
                with changed(shard, piece, decay) as fp32:
                    fp32.addcmul_(gradient.values[own].float(), factors[own], value=-lr * scale)


@dataclass(frozen=True)
class Dense(Update):
    """The update ``scale * make(piece)``, for an update that is not a product of two thin factors.

    Attributes:
        make: computes the update where a piece of the weights is: matrices x rows x columns, fp32. It is called once
            for each piece, when that is written, so that little is dense at a time.
        scale: factor on the update.
    """

    make: Callable[[Piece], torch.Tensor]
    scale: float

    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """For each piece: compute the update, decay the weights and subtract it from them."""
        for piece in shard.weights.dense_pieces:
            with changed(shard, piece, decay) as fp32:
                fp32.sub_(self.make(piece), alpha=lr * self.scale)

    def dense(self, shard: MatrixShard, piece: Piece) -> torch.Tensor:
        """The update, scale included, where a piece is: matrices x rows x columns, fp32."""
        return self.make(piece) * self.scale


@dataclass(frozen=True)
class Quotient(Update):
    """The update ``scale * numerator / denominator``, element by element.

    Attributes:
        numerator: computes it where a piece of the weights is: matrices x rows x columns, fp32. It is called once for
            each piece, when that is written, so that little is dense at a time.
        denominator: likewise.
        scale: factor on the update.
        by_matrix: computes both, matrix by matrix, where every matrix is in one place; None where they are not.
    """

    numerator: Callable[[Piece], torch.Tensor]
    denominator: Callable[[Piece], torch.Tensor]
    scale: float
    by_matrix: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None

    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """For each piece: decay the weights and subtract the quotient from them."""
        if self.by_matrix is not None and (singles := shard.weights.singles) is not None:
            if decay:
                torch._foreach_mul_(singles, 1 - decay)
            for weight, (numerator, denominator) in zip(singles, self.by_matrix, strict=True):
                weight.addcdiv_(numerator, denominator, value=-lr * self.scale)
            return
        for piece in shard.weights.dense_pieces:
            with changed(shard, piece, decay) as fp32:
                fp32.addcdiv_(self.numerator(piece), self.denominator(piece), value=-lr * self.scale)


@dataclass(frozen=True)
class RescaledWeights(Update):
    """The new weights ``diag(scales) W - kept @ compressed^T``, with a scale for each row or column of ``W``.

    The method applies the learning rate and the weight decay itself.

    Attributes:
        axis: the rows or columns of the matrices.
        scales: matrices x held rows of the axis x 1, fp32.
        kept: matrices x held kept rows x k, fp32.
        compressed: matrices x held compressed rows x k, fp32.
    """

    axis: Axis
    scales: torch.Tensor
    kept: torch.Tensor
    compressed: torch.Tensor

    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """Scale and subtract; ``lr`` and ``decay`` are not used."""
        step = Factors(self.kept, self.compressed, 1.0)
        if (singles := shard.weights.singles) is not None:
            scales = (self.scales if self.axis is shard.rows else self.scales.mT).unbind()
            torch._foreach_mul_(singles, list(scales))
            step.write_to(shard, 1.0, 0.0)
            return
        for piece in shard.weights.changed_pieces:
            rows, columns = step._of(shard, piece)
            with changed(shard, piece) as fp32:
                fp32.mul_(along(shard, self.axis, piece, self.scales)).baddbmm_(rows, columns.mT, alpha=-1)


@dataclass(frozen=True)
class NewWeights(Update):
    """The new weights, for a method whose step is not the old weights plus a direction.

    The method applies the learning rate and the weight decay itself.

    Attributes:
        make: computes the new weights where a piece of the old ones is: matrices x rows x columns, fp32. It is called
            once for each piece, when that is written.
    """

    make: Callable[[Piece], torch.Tensor]

    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """Replace the weights; ``lr`` and ``decay`` are not used."""
        for piece in shard.weights.dense_pieces:
            write(shard, piece, self.make(piece))
