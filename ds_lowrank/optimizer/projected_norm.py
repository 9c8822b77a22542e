"""The norm of what a step sees under projected reduction: projected gradients, and gradients that are not projected.

Nobody has the norm of the whole gradient there. For a projection onto orthonormal columns the projected norm is at most
that: what the subspaces leave out is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.stack import Stack
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.marks import is_tied_between_stages
from ds_lowrank.sharding.reduce import Executor, Rounds, sum_request

EPS = 1e-6
"""Added to the norm before dividing, as by ``torch.nn.utils.clip_grad_norm_``."""


def projected_norm(
    stacks: Sequence[Stack],
    slots: Sequence[Slot],
    largest: float,
    executor: Executor,
    grid: Grid,
    is_local: bool,
) -> Rounds[float]:
    """The 2-norm over all matrices and ranks, the same number on all of them.

    Args:
        stacks: of the projected matrices, with what was found in their gradients.
        slots: of all parameters with gradients; those of parameters that are not projected are reduced already.
        largest: about the largest magnitude of any gradient.
        executor: of the ranks that share the matrices.
        grid: tensor and pipeline parallelism.
        is_local: whether tensor-parallel ranks project their own shards and are not among these ranks.
    """
    scale, counted = largest or 1.0, {slot.matrix.member.number: 1 / slot.copies for slot in slots if slot.is_projected}
    squares = [torch.zeros((), dtype=torch.float64, device=slots[0].fragment.store.device)]
    for stack in stacks:
        norms = torch.linalg.vector_norm(stack.found.projected / scale, dim=(1, 2), dtype=torch.float64)
        shares = [counted[member.number] for member in stack.shard.members]
        squares += [norm.square() * share for norm, share in zip(norms, shares, strict=True)]
    replicas = executor.size if is_local else executor.size // grid.tensor_size
    for slot in slots:
        if not slot.is_projected and not is_tied_between_stages(slot.parameter):
            norm = torch.linalg.vector_norm(slot.fragment.gradient, dtype=torch.float64) / scale
            squares.append(norm.square() / (replicas * slot.copies))
    own = torch.stack(squares).sum().float().view(1, 1)
    (total,) = yield [sum_request(own, [0], executor.size)]
    square = torch.tensor(float(total) * scale**2, dtype=torch.float64, device=own.device)
    for group in (grid.tensor if is_local else None, grid.pipeline):
        if group is not None:
            dist.all_reduce(square, group=group)
    return math.sqrt(float(square))
