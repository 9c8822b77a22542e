"""How much of its gradient a new basis captures: ``|H Q|^2 / |H|^2``, from 0 to 1.

At a refresh every rank notes the squares of its own elements and sends nothing. They are summed when somebody asks, so
that a step costs what it costs without them. Both squares of a matrix are over one factor, its safe scale, which the
ratio does not depend on; copies of a matrix on several ranks multiply both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_lowrank.collectives import all_gather_object
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.placement.grid import Grid
from ds_lowrank.sharding.reduce import Executor, sum_request


def captured_energies(slots: Sequence[Slot], executor: Executor, grid: Grid, is_local: bool) -> list[float]:
    """What bases that are new since the last call capture. Collective over the grid.

    Args:
        slots: all slots of the optimizer.
        executor: of the ranks that share the matrices.
        grid: tensor and pipeline parallelism.
        is_local: whether tensor-parallel ranks project their own shards and are not among these ranks.

    Returns:
        One number for each matrix of the whole model with a new basis, the same numbers on all ranks; of its newest one
        if there are several. A basis that was not found in a whole gradient has none.
    """
    projected = [slot for slot in slots if slot.is_projected]
    found = _ratios(projected, executor) if projected else []
    if is_local and grid.tensor_rank:  # shards are matrices of their own, but of copies one counts
        found = [one for one, slot in zip(found, projected, strict=True) if slot.copies == 1]
    known = [one for one in found if one is not None]
    for group in (grid.tensor if is_local else None, grid.pipeline):
        if group is not None:
            known = [energy for own in all_gather_object(known, group) for energy in own]
    return known


def _ratios(projected: Sequence[Slot], executor: Executor) -> list[float | None]:
    """Sum what was noted since the last call: of the same matrices on all ranks that have a part of them."""
    nothing = torch.zeros(2, dtype=torch.float32, device=projected[0].fragment.store.device)
    own = torch.stack([nothing if s.matrix.energies is None else s.matrix.energies for s in projected])
    numbers = [slot.matrix.member.number for slot in projected]
    (total,) = executor.exchange([sum_request(own, numbers, executor.size)])
    for slot in projected:
        slot.matrix.energies = None
    return [captured / whole if whole > 0 else None for captured, whole in total.view(-1, 2).tolist()]
