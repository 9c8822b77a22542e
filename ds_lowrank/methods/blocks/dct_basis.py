"""A basis of columns of the orthonormal DCT-II matrix, which is stored as their indices (arXiv 2505.17967).

The columns are those in which the gradient has most of its energy, ``|H D_j|``. Nothing is factored, and every rank
forms the rows that it needs from the indices.
"""

from __future__ import annotations

import torch

from ds_lowrank.linalg.dct import dct_columns
from ds_lowrank.methods.blocks.state_spec import TensorSpec
from ds_lowrank.sharding.elementwise import largest_magnitudes
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program


def indices_spec(shard: MatrixShard, rank: int) -> TensorSpec:
    """The spec of the indices of the columns, r x 1; fp32 has every integer up to 2^24."""
    return TensorSpec(shard.replicated_axis(rank), 1)


def gather_columns(shard: MatrixShard, own: torch.Tensor, rank: int) -> Program[torch.Tensor]:
    """The basis of stored indices.

    Args:
        shard: the stack.
        own: the indices that this rank stores: matrices x owned rows x 1, fp32.
        rank: how many columns a basis has.

    Returns:
        matrices x held compressed rows x rank, fp32.
    """
    return columns_at(shard, (yield from gather_indices(shard, own, rank)).squeeze(2))


def gather_indices(shard: MatrixShard, own: torch.Tensor, rank: int) -> Program[torch.Tensor]:
    """All indices of stored ones; zeros on a rank without a part of the matrices.

    Args:
        shard: the stack.
        own: matrices x owned rows x sets of indices, fp32.
        rank: how many indices a set has.

    Returns:
        matrices x rank x sets, int64.
    """
    indices = yield shard.replicated_axis(rank).all_gather(own)
    return shard.or_zeros(indices, rank).long()


def columns_at(shard: MatrixShard, indices: torch.Tensor) -> torch.Tensor:
    """The rows that this rank holds of some columns of the DCT-II matrix.

    Args:
        shard: the stack.
        indices: matrices x k, int64.

    Returns:
        matrices x held compressed rows x k, fp32.
    """
    return dct_columns(shard.compressed.size, shard.compressed.held, indices)


def strongest_columns(shard: MatrixShard, rank: int) -> Program[tuple[torch.Tensor, torch.Tensor]]:
    """Choose the columns ``D_j`` with the largest ``|H D_j|``.

    Args:
        shard: the stack, with this step's gradient attached.
        rank: how many columns to choose.

    Returns:
        Their indices, ascending, the same on all ranks: matrices x rank, int64. And ``H D`` at these columns: matrices
        x owned kept rows x rank, fp32.
    """
    size = shard.compressed.size
    everything = torch.arange(size, dtype=torch.int64, device=shard.device).unsqueeze(0)
    whole = columns_at(shard, everything).expand(len(shard), -1, -1)
    spectrum, magnitudes = yield (
        shard.kept.reduce_scatter(shard.times(whole)),  # H D
        shard.all_reduce(largest_magnitudes(shard)),
    )
    scaled = spectrum / magnitudes.clamp_min(torch.finfo(torch.float32).tiny)
    energies = yield shard.all_reduce(scaled.square_().sum(1).unsqueeze(2))
    order = energies.squeeze(2).argsort(dim=1, descending=True, stable=True)  # ties in the same order on all ranks
    indices = order[:, :rank].sort(dim=1).values
    return indices, spectrum.gather(2, indices.unsqueeze(1).expand(-1, spectrum.shape[1], -1))
