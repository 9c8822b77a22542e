"""Squared norms of the rows and columns of a gradient that was projected unit by unit and lifted again (VLoRP)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.elementwise import add_squared_norms
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program, Request
from ds_lowrank.sharding.units import Units


def squares_by_rows(
    shard: MatrixShard, units: Units, projected: torch.Tensor, projection: torch.Tensor, moment: torch.Tensor
) -> Program[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The held rows of M, and the squared norms of the rows and columns of ``H^ = R P^T``, which is not formed.

    With units u that are pieces of rows i: ``|H^_i|^2 = sum_u R_iu (P^T P) R_iu^T``, and the column of entry e of unit
    u has ``P_e (sum_i R_iu^T R_iu) P_e^T``. In fp64, since few directions of a projection may hold most of its length.

    Args:
        shard: the stack.
        units: pieces of rows.
        projected: R: matrices x owned groups x (units * rank), fp32.
        projection: P: matrices x entries of a unit x rank, fp32.
        moment: M: matrices x owned rows x (units * rank), fp32.

    Returns:
        M on the held kept rows, and the squared norms of the owned kept rows and of the owned compressed rows, x 1.
    """
    projected = torch.unflatten(projected.double(), 2, (units.per_group, -1))  # matrices x rows x units x rank
    projection = projection.double()
    gram = projection.mT @ projection
    kept = ((projected.flatten(1, 2) @ gram).view(projected.shape) * projected).sum((2, 3)).float().unsqueeze(2)
    by_unit = projected.permute(0, 2, 3, 1) @ projected.permute(0, 2, 1, 3)  # matrices x units x rank x rank
    size, rank = by_unit.shape[1] * by_unit.shape[2], by_unit.shape[3]
    small = shard.replicated_axis(size)
    moment, own = yield (
        units.axis.all_gather(moment),
        small.reduce_scatter(shard.local_contribution(by_unit.reshape(-1, size, rank).float())),
    )
    summed = shard.or_zeros((yield small.all_gather(own)), size).double().view(-1, units.per_group, rank, rank)
    of_entries = projection.unsqueeze(1)
    squares = ((of_entries @ summed) * of_entries).sum(3).flatten(1).float().unsqueeze(2).clamp_min(0)
    return moment, kept, shard.compressed.own(squares)


def sums_of_squares(shard: MatrixShard, lift: Callable[[Piece], torch.Tensor]) -> tuple[Request, Request]:
    """Ask for the squared norms of lifted matrices' rows and of their columns.

    Args:
        shard: the stack.
        lift: computes the lifted matrices where a piece of this rank's elements is, fp32.
    """
    axes = shard.rows, shard.columns
    sums = [torch.zeros(len(shard), axis.held_rows, 1, dtype=torch.float32, device=shard.device) for axis in axes]
    for piece in shard.weights.dense_pieces:
        lifted = piece._replace(values=lift(piece))
        for axis, found in zip(axes, sums, strict=True):
            add_squared_norms(shard, axis, lifted, found)
    return shard.rows.reduce_scatter(shard.once(sums[0])), shard.columns.reduce_scatter(shard.once(sums[1]))
