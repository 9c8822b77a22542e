"""The result of projecting a gradient, and the scale that keeps squares of gradients in the range of fp32.

Squares of numbers below 1e-19 or above 1e19 leave the range of fp32, and gradients of such sizes occur (loss scaling, a
stalled layer). A norm or an inner product is therefore taken of the gradient over its *safe scale*, a number of about
its largest magnitude that is the same on all ranks; what is computed from it is scaled back, or does not depend on it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from ds_lowrank.sharding.elementwise import largest_magnitudes
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program

SMALLEST_SCALE = 1e-36
ORDINARY = (1e-10, 1e10)
"""Gradients whose largest magnitude is within these bounds can be squared in fp32."""
T = TypeVar("T")


@dataclass
class ProjectedGradient:
    """What a method's ``project`` found in the gradients of a stack.

    Attributes:
        projected: this rank's rows of the projected gradients, fp32. Over all ranks they are finite, and not zero,
            exactly where the gradients are.
        due: whether a new basis (or random projection) was due in this step.
        magnitudes: about the largest magnitude of each gradient, the same numbers on all ranks; zero only if every
            element is zero: matrices, fp32. The optimizer fills it in before ``update``.
        host_magnitudes: the same numbers on the host.
        is_zero: whether the gradients are zero, on all ranks; also filled in. Matrices with and without a gradient of
            zeros are not updated together.
    """

    projected: torch.Tensor
    due: bool
    magnitudes: torch.Tensor | None = None
    host_magnitudes: list[float] = field(default_factory=list)
    is_zero: bool = False

    @property
    def refreshed(self) -> bool:
        """Whether this step uses a new basis."""
        return self.due

    @property
    def safe_scale(self) -> torch.Tensor:
        """What to divide the gradients by before squaring, 1 for zeros: matrices x 1 x 1, fp32."""
        assert self.magnitudes is not None
        scales = torch.where(self.magnitudes == 0, 1.0, self.magnitudes.clamp_min(SMALLEST_SCALE))
        return scales.view(-1, 1, 1)

    @property
    def host_safe_scales(self) -> list[float]:
        """The same numbers on the host, one for each matrix."""
        return [max(magnitude, SMALLEST_SCALE) if magnitude else 1.0 for magnitude in self.host_magnitudes]

    @property
    def are_ordinary(self) -> bool:
        """Whether squares of the gradients' elements, and sums of these, stay in the range of fp32.

        An element that is a billion times smaller than the largest one may still be lost; it adds nothing to a norm.
        """
        return all(ORDINARY[0] < magnitude < ORDINARY[1] for magnitude in self.host_magnitudes)

    @property
    def tells_apart(self) -> Sequence[Hashable]:
        """What of each matrix decides how it is updated; empty if all are updated alike."""
        return ()

    def energies(self, shard: MatrixShard, options: Any) -> torch.Tensor | None:
        """What a new basis captures of the gradients, and all that there is: ``|H Q|^2`` and ``|H|^2``.

        Args:
            shard: holds this step's gradients, and the weights before the step.
            options: of the matrices' group.

        Returns:
            This rank's contributions, over any factor that both share: matrices x 2, fp32. None where no orthonormal
            basis is found in a gradient, or no rank has its part of the summed gradient.
        """
        return None

    def scale_by(self, factor: float) -> None:
        """Multiply the gradients, as it were: what was found of them is linear in them, and is changed in place.

        Args:
            factor: the same on all ranks.
        """
        self.projected.mul_(factor)
        assert self.magnitudes is not None
        self.magnitudes = self.magnitudes * factor
        self.host_magnitudes = [magnitude * factor for magnitude in self.host_magnitudes]

    def at(self, positions: Sequence[int]) -> Any:
        """What was found for some of the matrices.

        Args:
            positions: of these matrices in the stack.
        """
        return _at(self, positions)


def _at(found: T, positions: Sequence[int]) -> T:
    """Some of the matrices in every tensor and list of a dataclass."""
    if isinstance(found, torch.Tensor):
        return found[torch.tensor(positions, dtype=torch.int64, device=found.device)]  # type: ignore[return-value]
    if isinstance(found, list):
        return [found[i] for i in positions]  # type: ignore[return-value]
    if is_dataclass(found) and not isinstance(found, type):
        return replace(found, **{each.name: _at(getattr(found, each.name), positions) for each in fields(found)})
    return found


def safe_scale_of(shard: MatrixShard) -> Program[torch.Tensor]:
    """The safe scale of gradients that have not been projected yet.

    Args:
        shard: the stack, with this step's gradients attached.

    Returns:
        matrices x 1 x 1, fp32, the same bits on all ranks.
    """
    total: torch.Tensor = yield shard.all_reduce(largest_magnitudes(shard))
    return total.clamp_min(torch.finfo(torch.float32).tiny)


def safe_ratio(numerator: torch.Tensor, denominator: torch.Tensor, otherwise: float = 0.0) -> torch.Tensor:
    """Divide elementwise, and return ``otherwise`` where the denominator is zero.

    Args:
        numerator: of any shape.
        denominator: of a shape that broadcasts with it.
        otherwise: the result for a denominator of zero.
    """
    return torch.where(denominator == 0, otherwise, numerator / denominator)
