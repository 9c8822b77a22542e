"""The three forms in which a method returns its update, and how each is written into a rank's weights.

The optimizer's rule is ``W <- (1 - decay) W - lr * update``, on the elements that this rank holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.matrix import MatrixShard


class Update(ABC):
    """What a method returns for one matrix: a direction to descend along, or the new weights."""

    @abstractmethod
    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """Step ``shard.weights`` in place.

        Args:
            shard: the matrix. Its weights have any floating dtype; the arithmetic is fp32, rounded once.
            lr: the effective learning rate of this step.
            decay: the decoupled weight decay of this step, ``lr * weight_decay``.
        """


@dataclass(frozen=True)
class Factors(Update):
    """The update ``scale * kept @ compressed^T``, never formed as a whole matrix.

    Attributes:
        kept: held kept rows x k, fp32.
        compressed: held compressed rows x k, fp32.
        scale: factor on the product.
    """

    kept: torch.Tensor
    compressed: torch.Tensor
    scale: float

    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """Decay each rectangle of the weights and subtract the product from it, in one ``addmm``."""
        for rectangle, weight in zip(shard.part.rectangles, shard.views(shard.weights), strict=True):
            by_row, by_column = self._of(shard, rectangle)
            fp32 = weight.float()
            torch.addmm(fp32, by_row, by_column.T, beta=1 - decay, alpha=-lr * self.scale, out=fp32)
            if fp32 is not weight:
                weight.copy_(fp32)

    def lifted(self, shard: MatrixShard) -> torch.Tensor:
        """The product ``kept @ compressed^T`` without its scale, on the elements this rank holds: flat, fp32."""
        flat = torch.empty(shard.part.numel, dtype=torch.float32, device=self.kept.device)
        for rectangle, piece in zip(shard.part.rectangles, shard.views(flat), strict=True):
            by_row, by_column = self._of(shard, rectangle)
            torch.mm(by_row, by_column.T, out=piece)
        return flat

    def dense(self, shard: MatrixShard) -> torch.Tensor:
        """The update, scale included, on the elements this rank holds: flat, fp32."""
        return self.lifted(shard) * self.scale

    def _of(self, shard: MatrixShard, rectangle: Rectangle) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of both factors that belong to a rectangle: that of its rows, then that of its columns."""
        by_row, by_column = self.kept, self.compressed
        if shard.side == "left":
            by_row, by_column = by_column, by_row
        return by_row[shard.held_rows(rectangle)], by_column[shard.held_columns(rectangle)]


@dataclass(frozen=True)
class Dense(Update):
    """The update ``scale * make()``, for an update that is not a product of two thin factors.

    Attributes:
        make: computes the update on the elements this rank holds: flat, fp32. It is called once, when the update is
            written, so that only one matrix at a time is dense.
        scale: factor on the update.
    """

    make: Callable[[], torch.Tensor]
    scale: float

    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """Compute the update, decay the weights and subtract it from them."""
        if not shard.part.numel:
            return
        fp32 = shard.weights.float()
        fp32.mul_(1 - decay).sub_(self.make(), alpha=lr * self.scale)
        if fp32 is not shard.weights:
            shard.weights.copy_(fp32)

    def dense(self, shard: MatrixShard) -> torch.Tensor:
        """The update, scale included, on the elements this rank holds: flat, fp32."""
        return self.make() * self.scale


@dataclass(frozen=True)
class NewWeights(Update):
    """The new weights, for a method whose step is not the old weights plus a direction.

    The method applies the learning rate and the weight decay itself.

    Attributes:
        make: computes the new weights on the elements this rank holds: flat, fp32. It is called once, when they are
            written.
    """

    make: Callable[[], torch.Tensor]

    def write_to(self, shard: MatrixShard, lr: float, decay: float) -> None:
        """Replace the weights; ``lr`` and ``decay`` are not used."""
        if shard.part.numel:
            shard.weights.copy_(self.make())
