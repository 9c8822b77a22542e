"""Projected reduction: what an optimizer does besides a step where it sums projections and not gradients.

Each data-parallel rank has a gradient of its own, and the states are dealt over these ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.errors import CheckpointError, ConfigError
from ds_lowrank.optimizer.accumulation import Accumulation
from ds_lowrank.optimizer.projected_norm import EPS, projected_norm
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.stack import Stack
from ds_lowrank.optimizer.states_of_ranks import states_on_first
from ds_lowrank.placement.grid import Grid
from ds_lowrank.sharding.reduce import Executor, Rounds

OF_RANKS = "of_data_parallel_ranks"
"""The key in a state dict under which the states of all data-parallel ranks are."""


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
    """Clipping, the gradients that are left to DeepSpeed, and the states of all ranks.

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
        self._of_all_ranks: list[dict[str, Any]] = []
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

    def gather_states(self, dump: Callable[[], dict[str, Any]]) -> None:
        """Bring together on the first data-parallel rank what DeepSpeed saves there for all. Collective.

        Args:
            dump: makes this rank's state dict.
        """
        self._of_all_ranks = []
        if self._ranks.group is not None and self._ranks.size > 1:
            self._of_all_ranks = states_on_first(dump(), self._ranks.group)

    def release_states(self) -> None:
        """Forget what was brought together."""
        self._of_all_ranks = []

    def with_other_ranks(self, own: dict[str, Any]) -> dict[str, Any]:
        """A state dict with those of all ranks, where they are brought together.

        Args:
            own: this rank's.
        """
        return {**own, OF_RANKS: self._of_all_ranks} if self._of_all_ranks else own


def own_state(saved: dict[str, Any], ranks: DataParallel | None) -> dict[str, Any]:
    """This rank's part of a state dict that may have those of all data-parallel ranks.

    Args:
        saved: a state dict.
        ranks: the data-parallel ranks under projected reduction; None if gradients are reduced.

    Raises:
        CheckpointError: it was saved on another number of ranks, or with projected reduction and this is without.
    """
    parts = saved.get(OF_RANKS)
    if parts is None:
        return saved
    if ranks is None or len(parts) != ranks.size:
        here = "reduction 'gradient'" if ranks is None else f"{ranks.size} of them"
        raise CheckpointError(
            f"the checkpoint was saved with reduction 'projected' on {len(parts)} data-parallel ranks, and this run "
            f"has {here}: resume with the reduction and the number of ranks of the run that saved it"
        )
    own: dict[str, Any] = parts[ranks.rank]
    return own
