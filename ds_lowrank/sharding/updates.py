from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factors:
    """An update ``scale * kept @ compressed^T``, in the rows this rank holds."""

    kept: torch.Tensor
    compressed: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Dense:
    """An update that is not a product of two factors.

    Attributes:
        make: computes it for the elements this rank holds, flat, fp32. Called once, when it is written, so that one
            matrix at a time is dense.
        scale: multiplies it.
    """

    make: Callable[[], torch.Tensor]
    scale: float


@dataclass(frozen=True)
class NewWeights:
    """The new weights themselves, where they are no sum of the old ones and an update: rate and decay are applied.

    Attributes:
        make: computes them for the elements this rank holds, flat, fp32. Called once, when they are written.
    """

    make: Callable[[], torch.Tensor]


Update = Factors | Dense | NewWeights
