"""Finding a basis of the leading subspace of a gradient whose elements are spread over ranks."""

from __future__ import annotations

import torch

from ds_lowrank.linalg.orthonormal import leading_singular_vectors, orthonormal
from ds_lowrank.linalg.sketch import normal
from ds_lowrank.sharding.elementwise import blocks
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program


def singular_basis(shard: MatrixShard, rank: int) -> Program[torch.Tensor]:
    """The gradient's leading singular vectors, by an exact SVD of the whole gradient on each matrix's root.

    Args:
        shard: the stack, with this step's gradient attached.
        rank: how many vectors.

    Returns:
        matrices x owned compressed rows x rank of the basis, fp32.
    """
    gradient, side = (yield shard.rows.reduce_to_root(blocks(shard, shard.rows))), shard.side
    if shard.transposed:  # an SVD of the transpose would have other signs
        gradient, side = gradient.mT.contiguous(), "left" if side == "right" else "right"
    own: torch.Tensor = yield shard.compressed.scatter_from_root(leading_singular_vectors(gradient, rank, side))
    return own


def randomized_range(shard: MatrixShard, rank: int, seed: int, counter: int) -> Program[torch.Tensor]:
    """A basis of the gradient's leading subspace, by a randomized range finder with one power step.

    This is Algorithm 4.4 of Halko et al., arXiv 0909.4061. Both products in ``H^T (H sketch)`` are orthonormalised:
    directions ``k`` times weaker than the strongest are then found to ``k`` rounding errors instead of ``k^2``, however
    the sums are split over ranks.

    Args:
        shard: the stack, with this step's gradient attached.
        rank: how many columns the basis has.
        seed: the run's seed.
        counter: the step, so that every refresh draws a new sketch.

    Returns:
        matrices x owned compressed rows x rank of the basis, fp32, orthonormal over all ranks.
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
    """The rows of random normal matrices, compressed x rank, that this rank multiplies its elements by.

    Args:
        shard: the stack.
        rank: how many columns a sketch has.
        seed: the run's seed.
        counter: distinguishes the sketches of one matrix; a step, for example.

    Returns:
        matrices x held compressed rows x rank, fp32.
    """
    return normal(seed, shard.names, counter, shard.compressed.held, (0, rank), shard.device)


def with_lost_columns(
    shard: MatrixShard, basis: torch.Tensor, lengths: torch.Tensor, seed: int, counter: int
) -> torch.Tensor:
    """A basis with random numbers in the place of its columns of zeros.

    A gradient with fewer than r directions leaves a basis with columns of zeros. What an iteration makes of a basis
    would keep them for ever; from random numbers it finds the directions that later gradients have.

    Args:
        shard: the stack.
        basis: matrices x held compressed rows x rank, fp32.
        lengths: about the squared lengths of its columns over all ranks, zero for those of zeros: matrices x 1 x rank.
        seed: the run's seed.
        counter: the step.
    """
    return torch.where(lengths == 0, held_sketch(shard, basis.shape[2], seed, counter), basis)
