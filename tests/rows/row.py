"""How the tests run one method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, int]
Options = dict[str, Any]
Gradients = Callable[[int], torch.Tensor]
"""The gradient of a step, by its number."""

UNDER_ENGINES = {"lr": 1e-2, "eps": 3e-5}
"""Adam's first step divides a gradient by its own magnitude. Near ``eps`` an element passes its rounding error on, here
1e-9 to 1e-8, as that over four ``eps``; and which elements are near it changes with a CPU's kernels. This is well below
the gradients, about 1e-3, and leaves what two orders of summation cannot agree on well below the bounds of the tests.
"""

SMALL = {"rank": 3, "update_proj_gap": 3}
"""Options for matrices of about 12 x 20."""
CASE = {"rank": 4, "update_proj_gap": 2}
"""Options for the simulated world."""
COSTS = {"rank": 4, "update_proj_gap": 3}
"""Options for 48 x 20."""


def gradients_with(values: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Shape], Gradients]:
    """Gradients that are turned at random in every step and keep their singular values.

    How far a rounding error turns a subspace, or a singular vector, is one over the gap to the next value.

    Args:
        values: the singular values, from their numbers 0, 1, 2, ...
    """

    def gradients(shape: Shape) -> Gradients:
        def gradient(step: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(step)
            k = min(shape)
            u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in shape)
            return 10 * u * values(torch.arange(k)) @ v.T

        return gradient

    return gradients


@dataclass(frozen=True, kw_only=True)
class Row:
    """How the tests run one method.

    Attributes:
        small: options for matrices of about 12 x 20, with refreshes at steps 0, 3, 6.
        cases: options for the simulated world, refreshes at steps 0, 2, 4: together every option.
        engine: options for real engines on matrices of 40 x 40, 99 x 40 and 40 x 99, refreshes at steps 0, 4, 8.
        costs: options for 48 x 20 whose rank stays fixed, refresh at step 3; None for ``small``.
        fused: options for models with fused weights; None for ``small``.
        grid: two sets of options for matrices that tensor parallelism splits or replicates; None for the first cases.
        multiple: sides of a matrix must be multiples of it in all cases.
        gradients: makes the simulated gradients for a shape; None for standard normal ones.
        starts_from_zero: whether zero weights are as good as any; the difference of two updates is then exact.
        first_step_ignores_size: whether a factor on the gradient leaves the first step alone, as in Adam.
        follows_gradient_rows: whether an update has no direction that the rows of the gradient have not.
        keeps_zeros: whether a weight's rows and columns stay zero where those of every gradient are.
        keeps_moments: whether the state of ``small`` has moments, which are stored in ``state_dtype``.
    """

    small: Options
    cases: Sequence[Options]
    engine: Options
    costs: Options | None = None
    fused: Options | None = None
    grid: Sequence[Options] | None = None
    multiple: int = 1
    gradients: Callable[[Shape], Gradients] | None = None
    starts_from_zero: bool = True
    first_step_ignores_size: bool = False
    follows_gradient_rows: bool = False
    keeps_zeros: bool = False
    keeps_moments: bool = True

    @classmethod
    def of_options(cls, keys: Mapping[str, Any]) -> Row:
        """The row of a method that has none, from the names of its options."""

        def at(rank: int, gap: int) -> Options:
            return {key: value for key, value in {"rank": rank, "update_proj_gap": gap}.items() if key in keys}

        return cls(small=at(3, 3), cases=[at(4, 2)], engine={**UNDER_ENGINES, **at(4, 4)})

    def fit(self, shape: Shape) -> Shape:
        """A shape that all cases fit: each side, rounded up to a multiple."""
        m, n = (-(-side // self.multiple) * self.multiple for side in shape)
        return m, n

    def cost_options(self, changes: Options) -> Options:
        """The options of ``costs`` with some changes; APOLLO-Mini chooses its own rank."""
        options = self.small if self.costs is None else self.costs
        return {key: value for key, value in options.items() if key != "rank" or not changes.get("mini")} | changes

    @property
    def fused_options(self) -> Options:
        """The options for models with fused weights."""
        return self.small if self.fused is None else self.fused

    @property
    def grid_options(self) -> Sequence[Options]:
        """The options for matrices that tensor parallelism splits or replicates."""
        return self.cases[:2] if self.grid is None else self.grid

    @property
    def shapes(self) -> list[Shape]:
        """A tall, a wide and a square matrix."""
        return [self.fit(shape) for shape in ((17, 9), (9, 17), (12, 12))]

    def gradients_for(self, shape: Shape) -> Gradients:
        """The gradients of the simulated tests; standard normal ones are drawn from torch's global state."""
        return (lambda step: torch.randn(shape)) if self.gradients is None else self.gradients(shape)

    def start(self, shape: Shape) -> torch.Tensor:
        """The weights that a simulated test starts with."""
        return torch.zeros(shape) if self.starts_from_zero else torch.randn(shape)
