"""A random orthonormal basis, which is no function of the gradient."""

from __future__ import annotations

import torch

from ds_lowrank.linalg.orthonormal import orthonormal
from ds_lowrank.linalg.sketch import normal
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program


def random_basis(shard: MatrixShard, rank: int, seed: int, counter: int) -> Program[torch.Tensor]:
    """The orthonormal factor of a standard normal matrix, a function of seed, name and counter.

    It is drawn once, on each matrix's root. Backward that has projected onto it has already gathered it.

    Args:
        shard: the stack.
        rank: how many columns the basis has.
        seed: the run's seed.
        counter: tells apart the bases of one matrix; 0 for the first.

    Returns:
        matrices x owned compressed rows x rank of the basis, fp32, orthonormal over all ranks.
    """
    if shard.is_accumulated and shard.held_basis is not None:
        return shard.compressed.own_of_held(shard.held_basis)
    rooted = [shard.names[i] for i in shard.rooted]
    drawn = orthonormal(normal(seed, rooted, counter, (0, shard.compressed.size), (0, rank), shard.device))
    own: torch.Tensor = yield shard.compressed.scatter_from_root(drawn)
    return own
