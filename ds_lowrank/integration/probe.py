"""Losses at perturbed weights: the mean over all ranks, from the same random state each time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.collectives import RemoteError, is_distributed
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.optimizer.perturbation import Perturbation


@contextmanager
def perturbed_weights(
    optimizer: LowRankOptimizer,
    losses: Callable[[], list[torch.Tensor]],
    device: torch.device,
    group: Any,
    micro_batch: int = 0,
) -> Iterator[Perturbation]:
    """Weights where the loss is higher, inside the context; every bit is put back when it ends, whatever happens.

    Args:
        optimizer: of a method with an ``ascent``.
        losses: runs this rank's micro-batches, and returns their losses.
        device: of the model.
        group: the ranks over which the losses are averaged; None for all.
        micro_batch: the number of the first of these micro-batches in its step.

    Raises:
        ValueError: the optimizer's method takes its gradient at the weights.
        RemoteError: a probe failed on another rank; says which.
    """
    perturbation = optimizer.perturbation
    if perturbation is None:
        raise ValueError(f"{optimizer.method.name} takes its gradient at the weights: nothing to perturb")
    random = RandomState()
    try:
        with torch.no_grad():
            perturbation.ascend(Probe(losses, random, device, group), optimizer.options, micro_batch)
        random.rewind()
        yield perturbation
    finally:
        with torch.no_grad():
            perturbation.restore()


class Probe:
    """The mean loss of some micro-batches over all ranks, at whatever weights the model has.

    Args:
        losses: runs this rank's micro-batches, and returns their losses.
        random: the state that every pass starts from.
        device: of the model.
        group: the ranks over which the loss is averaged; None for all.
    """

    def __init__(
        self, losses: Callable[[], list[torch.Tensor]], random: RandomState, device: torch.device, group: Any
    ) -> None:
        self._losses, self._random, self._device, self._group = losses, random, device, group

    def __call__(self) -> float:
        """The mean loss, the same number on all ranks. Collective.

        Raises:
            RemoteError: a forward pass failed on another rank; says which.
        """
        self._random.rewind()
        error: Exception | None = None
        loss = math.nan
        try:
            loss = float(torch.stack(self._losses()).double().mean())
        except Exception as caught:
            error = caught
        return self._mean(loss, error)

    def _mean(self, loss: float, error: Exception | None) -> float:
        """The mean over the ranks, by one collective that also carries whether one of them failed."""
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
    """The random state that all passes over the same micro-batches start from, so that dropout is the same in each."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._device = torch.accelerator.current_accelerator()
        self._own = self._module().get_rng_state() if self._device is not None else None
        self._tracker = self._megatron_tracker()
        self._tracked = None if self._tracker is None else self._tracker.get_states()

    def _module(self) -> Any:
        return torch.get_device_module(self._device)

    def rewind(self) -> None:
        """Set the state of the CPU, the device and megatron-core to what it was when this object was made."""
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            self._module().set_rng_state(self._own)
        if self._tracker is not None:
            self._tracker.set_states(self._tracked)

    @staticmethod
    def _megatron_tracker() -> Any:
        """The tracker of the random states for dropout in megatron-core's layers, if it has been seeded."""
        module = sys.modules.get("megatron.core.tensor_parallel.random")
        tracker = None if module is None else module.get_cuda_rng_tracker()
        return tracker if tracker is not None and tracker.is_initialized() else None
