"""AdaZo-SAM's ascent (Refael et al., arXiv 2502.19571): a step towards higher loss, found by forward passes alone.

    c_j    = (f(W + mu Pi_j) - f(W - mu Pi_j)) / (2 mu)      two-sided; one-sided (f(W + mu Pi_j) - f(W)) / mu
    G_pert = 1/q sum_j c_j Pi_j                              q random directions Pi_j, all matrices at once
    W     <- W + rho G_pert / |G_pert|                       for the one backward pass

:mod:`ds_lowrank.methods.blocks.directions` has the directions that a matrix is probed along, and
:mod:`ds_lowrank.optimizer.perturbation` moves and restores the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Ascent:
    """How a method searches for higher loss around the weights; the same for all matrices of an optimizer.

    Attributes:
        probes: ``q``, random directions per step.
        probe_radius: ``mu``.
        radius: ``rho``, the norm of the perturbation; if ``per_matrix``, of each matrix's perturbation.
        two_sided: whether each direction is tried on both sides.
        per_matrix: whether ``|G_pert|`` is taken over each matrix instead of over all of them.
        per_micro_batch: whether every micro-batch has its own perturbation.
    """

    probes: int
    probe_radius: float
    radius: float
    two_sided: bool
    per_matrix: bool
    per_micro_batch: bool


class MovableWeights(Protocol):
    """The weights of all matrices that an ascent perturbs, over all ranks."""

    def probe(self, name: str, distance: float) -> None:
        """Set all weights to ``saved + distance * Pi``.

        Args:
            name: names the random direction ``Pi``.
            distance: how far to move.
        """

    def mirror(self) -> None:
        """Move all weights to the other side of the saved ones, exactly as far away."""

    def climb(self, names: Sequence[str], shares: Sequence[float], radius: float, per_matrix: bool) -> None:
        """Set all weights to ``saved + radius * G / |G|`` with ``G = sum_j shares_j Pi_j``.

        Args:
            names: of the directions ``Pi_j``.
            shares: the weight of each direction.
            radius: the norm of the perturbation.
            per_matrix: whether ``|G|`` is taken over each matrix instead of over all of them.
        """


def ascend(ascent: Ascent, weights: MovableWeights, loss: Callable[[], float], names: Sequence[str]) -> bool:
    """Probe the loss around the weights, and leave the weights where it is higher.

    Args:
        ascent: q, mu, rho and the variants.
        weights: the weights to move.
        loss: returns the loss at the current weights, the same number on all ranks.
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
    """The paper's ``c_j``: the slope of the loss along each direction. The weights are left at the last probe.

    Args:
        ascent: q, mu and whether differences are two-sided.
        weights: the weights to move.
        loss: returns the loss at the current weights, the same number on all ranks.
        names: of the q directions.
    """
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
