"""Projected reduction: what an optimizer does besides a step where it sums projections and not gradients.

Each data-parallel rank has a gradient of its own, and the states are dealt over these ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_lowrank.errors import ConfigError
from ds_lowrank.optimizer.accumulation import Accumulation
from ds_lowrank.optimizer.projected_norm import EPS, projected_norm
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.stack import Stack
from ds_lowrank.placement.grid import Grid
from ds_lowrank.sharding.reduce import Executor, Rounds


@dataclass(frozen=True)
class DataParallel:
    """The ranks that have gradients of their own.

    Attributes:
        group: these ranks; None for this rank alone.
        share: what the gradient of one of them counts in their sum: one over their number for an average.
    """

    group: dist.ProcessGroup | None = None
    share: float = 1.0

    @property
    def rank(self) -> int:
        """This rank's index among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self.group is None else dist.get_world_size(self.group)


def alone() -> DataParallel:
    """This rank alone, where nobody has told which ranks average their gradients.

    Raises:
        ConfigError: there are several ranks.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            "reduction 'projected' on several ranks needs an engine of ds_lowrank.initialize, which tells over which "
            "of them gradients are averaged; without one, set reduction to 'gradient'"
        )
    return DataParallel()


class ProjectedReduction:
    """Clipping, and the gradients that are left to DeepSpeed.

    Args:
        slots: of all parameters.
        accumulation: what backward adds up.
        ranks: those that have gradients of their own.
        executor: of the ranks that share the matrices.
        grid: tensor and pipeline parallelism.
        is_local: whether tensor-parallel ranks project their own shards.

    Attributes:
        accumulation: as given.
        norm: that of the last step, before clipping; None before the first.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        accumulation: Accumulation,
        ranks: DataParallel,
        executor: Executor,
        grid: Grid,
        is_local: bool,
    ) -> None:
        self.accumulation = accumulation
        self.norm: float | None = None
        self._ranks, self._executor, self._grid, self._is_local = ranks, executor, grid, is_local
        self._rest = list(dict.fromkeys(slot.parameter for slot in slots if not slot.is_projected))
        accumulation.watch(slot for slot in slots if slot.is_projected)

    def gradients_to_reduce(self) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
        """The gradients that DeepSpeed sums over data-parallel ranks: of parameters that are not projected.

        Returns:
            These gradients, zeros where backward has made none, as on other ranks it may have; and none of experts.
        """
        for parameter in self._rest:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._rest if parameter.grad is not None], {}

    def clip(
        self, limit: float, slots: Sequence[Slot], stacks: Sequence[Stack], magnitudes: Sequence[float]
    ) -> Rounds[None]:
        """Take the norm of what this step sees, and scale it down to a limit.

        Args:
            limit: ``projected_gradient_clipping``.
            slots: that are stepped.
            stacks: of the projected ones, with what was found in their gradients.
            magnitudes: of all gradients.
        """
        largest = max(magnitudes, default=0.0)
        norm = yield from projected_norm(stacks, slots, largest, self._executor, self._grid, self._is_local)
        self.norm = norm
        if not limit or norm + EPS <= limit:
            return
        for stack in stacks:
            stack.found.scale_by(limit / (norm + EPS))
        for store in {id(s.fragment.store): s.fragment.store for s in slots if not s.is_projected}.values():
            if store.grad is not None:
                store.grad.mul_(limit / (norm + EPS))
