"""A basis that is turned towards what it leaves out of the gradient, by a step on the Grassmannian."""

from __future__ import annotations

import torch

from ds_lowrank.linalg.grassmann import geodesic_step
from ds_lowrank.methods.blocks.range_finder import with_lost_columns
from ds_lowrank.sharding.elementwise import largest_magnitudes
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program

TINY = torch.finfo(torch.float32).tiny


def turned_basis(
    shard: MatrixShard, own: torch.Tensor, step_size: float, seed: int, step: int
) -> Program[torch.Tensor]:
    """The basis after a geodesic step along the leading part of the gradient of ``|H - H Q Q^T|^2``.

    What turns it is ``(I - Q Q^T) H^T H Q``, minus half of that gradient; its leading singular vectors are found on the
    root of each matrix.

    Args:
        shard: the stack, with this step's gradient.
        own: ``Q``: matrices x owned compressed rows x r, fp32.
        step_size: eta: times the largest singular value, the angle.
        seed: of the random numbers in the place of columns of zeros.
        step: the number of steps so far.

    Returns:
        matrices x owned compressed rows x r, fp32.
    """
    held, lengths, safe_scale = yield (
        shard.compressed.all_gather(own),
        shard.all_reduce(own.square().sum(1, keepdim=True)),
        shard.all_reduce(largest_magnitudes(shard)),
    )
    safe_scale = safe_scale.clamp_min(TINY)
    start = with_lost_columns(shard, held, lengths, seed, step)
    tall = yield shard.kept.reduce_scatter(shard.times(start))
    tall = yield shard.kept.all_gather(tall / safe_scale)
    pull, basis = yield (
        shard.compressed.reduce_to_root(shard.transposed_times(tall) / safe_scale),
        shard.compressed.gather_to_root(own),
    )
    eta = step_size * shard.of_rooted(safe_scale).double().square()
    turned: torch.Tensor = yield shard.compressed.scatter_from_root(geodesic_step(basis, pull, eta))
    return turned
