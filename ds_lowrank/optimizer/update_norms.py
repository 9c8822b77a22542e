"""How far a step moves the projected matrices: ``|W_after - W_before| / |W_before|`` over all of them.

What is compared are the weights as they are stored, so weight decay and rounding count. A measured step copies the
weights of one stack at a time, on the device, and changes no bit of what the step computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.stack import Stack
from ds_lowrank.placement.grid import Grid
from ds_lowrank.sharding.reduce import Distributed, Executor


class UpdateNorms:
    """Adds up squared norms of changes and weights over the calls of ``step`` that belong to one optimizer step."""

    def __init__(self) -> None:
        self._squares: list[torch.Tensor] = []

    @contextmanager
    def around(self, shares: Mapping[int, float], stack: Stack) -> Iterator[None]:
        """Measure what changes the weights of a stack within the context.

        Args:
            shares: from :func:`shares_of`.
            stack: attached.
        """
        weights = stack.shard.weights
        before = [run.clone() for run in weights.runs] if stack.is_here else []
        yield
        if not stack.is_here:
            return
        counted = iter(shares[member.number] for member in stack.shard.members)
        for run, old, size in zip(weights.runs, before, weights.sizes, strict=True):
            for new, was in zip(run.reshape(size, -1), old.reshape(size, -1), strict=True):
                change = torch.linalg.vector_norm(new.float() - was.float(), dtype=torch.float64)
                length = torch.linalg.vector_norm(was, dtype=torch.float64)
                self._squares.append(torch.stack([change, length]).square() * next(counted))

    def ratio(self, slots: Sequence[Slot], executor: Executor, grid: Grid, is_local: bool) -> float | None:
        """The norm of all changes over that of all weights. Collective over the grid.

        Args:
            slots: of the optimizer, for the devices of weights and model.
            executor: of the ranks that share the matrices.
            grid: tensor and pipeline parallelism.
            is_local: whether tensor-parallel ranks project their own shards and are not among these ranks.

        Returns:
            The same number on all ranks; None if no matrix was stepped.
        """
        none = torch.zeros(2, dtype=torch.float64, device=slots[0].fragment.store.device)
        total = torch.stack([none, *self._squares]).sum(0)
        if isinstance(executor, Distributed):
            dist.all_reduce(total, group=executor.group)
        total = total.to(slots[0].parameter.device)  # from the CPU, where the optimizer is offloaded
        for group in (grid.tensor if is_local else None, grid.pipeline):
            if group is not None:
                dist.all_reduce(total, group=group)
        change, length = total.sqrt().tolist()
        return change / length if length else None


def shares_of(slots: Sequence[Slot]) -> dict[int, float]:
    """What the elements of each projected matrix count here, by its number: those of copies count once together.

    Args:
        slots: of the matrices.
    """
    return {s.matrix.member.number: 1 / (s.copies * s.geometry.copies) for s in slots if s.is_projected}
