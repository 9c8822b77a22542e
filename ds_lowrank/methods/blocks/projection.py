"""The result of projecting a gradient, and the scale that keeps squares of gradients in the range of fp32.

Squares of numbers below 1e-19 or above 1e19 leave the range of fp32, and gradients of such sizes occur (loss scaling, a
stalled layer). A norm or an inner product is therefore taken of the gradient over its *safe scale*, a number of about
its largest magnitude that is the same on all ranks; what is computed from it is scaled back, or does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program

SMALLEST_SCALE = 1e-36


@dataclass
class ProjectedGradient:
    """What a method's ``project`` found in a gradient.

    Attributes:
        projected: this rank's rows of the projected gradient, fp32. Over all ranks it is finite, and not zero, exactly
            where the gradient is.
        due: whether a new basis (or random projection) was due in this step.
        magnitude: about its largest magnitude, the same number on all ranks; zero only if every element is zero. The
            optimizer fills it in before ``update``.
    """

    projected: torch.Tensor
    due: bool
    magnitude: float = 1.0

    @property
    def is_zero(self) -> bool:
        """Whether the gradient is zero, on all ranks."""
        return self.magnitude == 0

    @property
    def refreshed(self) -> bool:
        """Whether this step uses a new basis."""
        return self.due

    @property
    def safe_scale(self) -> float:
        """What to divide the gradient by before squaring; 1 for a gradient of zeros."""
        return max(self.magnitude, SMALLEST_SCALE) if self.magnitude else 1.0


def safe_scale_of(shard: MatrixShard) -> Program[torch.Tensor]:
    """The safe scale of a gradient that has not been projected yet.

    Args:
        shard: the matrix, with this step's gradient attached.

    Returns:
        1 x 1, fp32, the same bits on all ranks.
    """
    gradient = shard.flat_gradient
    largest = gradient.abs().max() if shard.part.numel else gradient.new_zeros(())
    total: torch.Tensor = yield shard.all_reduce(largest.float().view(1, 1))
    return total.clamp_min(torch.finfo(torch.float32).tiny)


def safe_ratio(numerator: torch.Tensor, denominator: torch.Tensor, otherwise: float = 0.0) -> torch.Tensor:
    """Divide elementwise, and return ``otherwise`` where the denominator is zero.

    Args:
        numerator: of any shape.
        denominator: of a shape that broadcasts with it.
        otherwise: the result for a denominator of zero.
    """
    return torch.where(denominator == 0, otherwise, numerator / denominator)
