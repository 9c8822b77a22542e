"""AdaZo-SAM's ascent (Refael et al., arXiv 2502.19571): where the loss is higher, found by forward passes alone.

    c_j    = (f(W + mu Pi_j) - f(W - mu Pi_j)) / (2 mu)      two-sided; one-sided (f(W + mu Pi_j) - f(W)) / mu
    G_pert = 1/q sum_j c_j Pi_j                              q random directions Pi_j, all matrices at once
    W     <- W + rho G_pert / |G_pert|                       for the one backward pass

Which directions a matrix is probed along is in :mod:`ds_lowrank.methods.blocks.directions`; how weights are moved and
restored is :mod:`ds_lowrank.optimizer.perturbation`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Ascent:
    """How a method looks for higher loss around the weights; the same for all matrices of an optimizer.

    Attributes:
        probes: ``q``, random directions per step.
        probe_radius: ``mu``.
        radius: ``rho``, the norm of the perturbation; if ``per_matrix``, of each matrix's perturbation.
        two_sided: whether each direction is tried on both sides.
        per_matrix: whether ``|G_pert|`` is taken over each matrix, and not over all of them.
        per_micro_batch: whether every micro-batch has a perturbation of its own.
    """

    probes: int
    probe_radius: float
    radius: float
    two_sided: bool
    per_matrix: bool
    per_micro_batch: bool


class MovableWeights(Protocol):
    """All weights that are perturbed, over all ranks."""

    def probe(self, name: str, distance: float) -> None:
        """``W <- saved + distance * Pi`` for the direction of that name."""

    def mirror(self) -> None:
        """To the other side of the saved weights, exactly as far away."""

    def climb(self, names: Sequence[str], shares: Sequence[float], radius: float, per_matrix: bool) -> None:
        """``W <- saved + radius * G / |G|`` with ``G = sum_j shares_j Pi_j``."""


def ascend(ascent: Ascent, weights: MovableWeights, loss: Callable[[], float], names: Sequence[str]) -> bool:
    """Probe, and leave the weights where the loss is higher.

    Args:
        ascent: q, mu, rho and the variants.
        weights: what is moved.
        loss: the loss at the present weights, the same number on all ranks.
        names: of the q directions.

    Returns:
        Whether a slope was found. If not (a loss that is not finite, or the same on all sides), the weights are left
        at the last probe, to be restored.
    """
    found = slopes(ascent, weights, loss, names)
    if not all(map(math.isfinite, found)) or not any(found):
        return False
    weights.climb(names, [c / ascent.probes for c in found], ascent.radius, ascent.per_matrix)  # G_pert
    return True


def slopes(ascent: Ascent, weights: MovableWeights, loss: Callable[[], float], names: Sequence[str]) -> list[float]:
    """The paper's ``c_j``, one per direction. The weights are left at the last probe."""
    mu, found = ascent.probe_radius, []
    here = None if ascent.two_sided else loss()
    for name in names:
        weights.probe(name, mu)
        ahead = loss()
        if here is None:
            weights.mirror()
            found.append((ahead - loss()) / (2 * mu))
        else:
            found.append((ahead - here) / mu)
    return found
