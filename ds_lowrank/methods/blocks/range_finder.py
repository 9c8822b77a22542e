"""Bases that are read off a gradient whose elements are spread over ranks."""

from __future__ import annotations

import torch

from ds_lowrank.linalg.orthonormal import leading_singular_vectors, orthonormal
from ds_lowrank.linalg.sketch import gaussian
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program


def singular_basis(shard: MatrixShard, rank: int) -> Program[torch.Tensor]:
    """The leading singular vectors, by an exact SVD of the gradient, gathered on the factoring rank.

    Returns:
        This rank's own rows of the basis, compressed x rank.
    """
    gradient = yield shard.rows.reduce_to_root(shard.block())
    own: torch.Tensor = yield shard.compressed.scatter_from_root(leading_singular_vectors(gradient, rank, shard.side))
    return own


def randomized_range(shard: MatrixShard, rank: int, seed: int, counter: int) -> Program[torch.Tensor]:
    """Randomized range finder with one power step (Halko et al., arXiv 0909.4061, Algorithm 4.4).

    Both halves of ``H^T (H sketch)`` are orthonormalised: directions ``k`` times weaker than the strongest are then
    found to ``k`` rounding errors instead of ``k^2``, whichever way the sums are split over ranks.

    Returns:
        This rank's own rows of the basis, compressed x rank.
    """
    tall = yield shard.kept.reduce_scatter(shard.times(held_sketch(shard, rank, seed, counter)))
    tall = yield shard.kept.gather_to_root(tall)
    tall = yield shard.kept.scatter_from_root(orthonormal(tall))
    tall = yield shard.kept.all_gather(tall)
    wide = yield shard.compressed.reduce_scatter(shard.transposed_times(tall))
    wide = yield shard.compressed.gather_to_root(wide)
    own: torch.Tensor = yield shard.compressed.scatter_from_root(orthonormal(wide))
    return own


def held_sketch(shard: MatrixShard, rank: int, seed: int, counter: int) -> torch.Tensor:
    """The rows of the random sketch, compressed x rank, that this rank's elements touch."""
    start, end = shard.compressed.held
    if start == end:
        return torch.empty(0, rank, device=shard.device)
    return gaussian(seed, shard.name, counter, shard.compressed.size, rank, shard.device)[start:end].clone()
