from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class ProjectedGradient:
    """What ``project`` found.

    Attributes:
        projected: this rank's share of the projected gradient, fp32. Over all ranks it is finite and not zero where
            the gradient is.
        refreshed: whether a new basis (or projection) belongs to this step. ``update`` takes it back where it keeps
            the old one.
        magnitude: about its largest magnitude, the same number on all ranks; zero exactly where all of it is. The
            optimizer fills it in before ``update``.
    """

    projected: torch.Tensor
    refreshed: bool
    magnitude: float = 1.0

    @property
    def is_zero(self) -> bool:
        return self.magnitude == 0

    @property
    def safe_scale(self) -> float:
        """What to divide by before squaring, so that no square leaves the range of fp32."""
        return max(self.magnitude, 1e-36) if self.magnitude else 1.0
