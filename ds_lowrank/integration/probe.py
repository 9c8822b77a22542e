from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.collectives import RemoteError, is_distributed


class Probe:
    """The mean loss of some micro-batches over all ranks, at whatever weights the model has.

    Args:
        losses: of this rank's micro-batches, which it runs.
        random: the state that every pass starts from.
        device: of the model.
        group: the ranks that run other micro-batches, or the same; None for all.
    """

    def __init__(
        self, losses: Callable[[], list[torch.Tensor]], random: RandomState, device: torch.device, group: Any
    ) -> None:
        self._losses, self._random, self._device, self._group = losses, random, device, group

    def __call__(self) -> float:
        self._random.rewind()
        error: Exception | None = None
        loss = math.nan
        try:
            loss = float(torch.stack(self._losses()).double().mean())
        except Exception as caught:
            error = caught
        return self._mean(loss, error)

    def _mean(self, loss: float, error: Exception | None) -> float:
        """The number is the same on all ranks, and so is whether one failed."""
        own = torch.tensor([loss, error is not None], dtype=torch.float64, device=self._device)
        found = [own]
        if is_distributed():
            found = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
            dist.all_gather(found, own, group=self._group)
        if error is not None:
            raise error
        failed = [str(rank) for rank, (_, flag) in enumerate(found) if flag]
        if failed:
            raise RemoteError(f"a probe's forward pass failed on rank {', '.join(failed)} of the data-parallel group")
        return sum(float(value) for value, _ in found) / len(found)


class RandomState:
    """The random state that every pass over the same micro-batches starts from: dropout then drops the same."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._device = torch.accelerator.current_accelerator()
        self._own = self._module().get_rng_state() if self._device is not None else None
        self._tracker = self._of_megatron_core()
        self._tracked = None if self._tracker is None else self._tracker.get_states()

    def _module(self) -> Any:
        return torch.get_device_module(self._device)

    def rewind(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            self._module().set_rng_state(self._own)
        if self._tracker is not None:
            self._tracker.set_states(self._tracked)

    @staticmethod
    def _of_megatron_core() -> Any:
        """Its layers drop by states of their own, where somebody has seeded them."""
        module = sys.modules.get("megatron.core.tensor_parallel.random")
        tracker = None if module is None else module.get_cuda_rng_tracker()
        return tracker if tracker is not None and tracker.is_initialized() else None
