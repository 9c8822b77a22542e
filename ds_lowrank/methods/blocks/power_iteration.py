"""A basis that moves in every step, by one block power iteration from where it is.

It follows an average of gradients: a momentum (LDAdam), or an average of ``H^T H`` (COSMOS). A product with the square
of a matrix squares singular values too, and the squares of fp32 would reach from directions that are a thousand times
weaker to none. The columns of a product are therefore normalised on the way, which leaves the subspace as it is, and
directions are kept until they are a million times weaker.
"""

from __future__ import annotations

import torch

from ds_lowrank.linalg.orthonormal import RANK_TOLERANCE, orthonormal_beside_zeros
from ds_lowrank.methods.blocks.error_feedback import product_with_error
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.range_finder import with_lost_columns
from ds_lowrank.sharding.elements import Elements
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.precision import products_in
from ds_lowrank.sharding.reduce import Program


def follow_momentum(
    shard: MatrixShard,
    own: torch.Tensor,
    momentum: torch.Tensor,
    rho: float,
    error: Elements | None,
    seed: int,
    step: int,
) -> Program[torch.Tensor]:
    """``qr(b^T b Q)`` with ``b = rho m Q^T + (1 - rho) (H + E)``, which is never formed: ``b Q = rho m + ..``.

    Args:
        shard: the stack, with this step's gradient.
        own: ``Q``: matrices x owned compressed rows x r, fp32.
        momentum: ``m``: matrices x owned kept rows x r, fp32.
        rho: the share of the momentum.
        error: ``E``, or None.
        seed: of the random numbers in the place of columns of zeros.
        step: the number of steps so far.

    Returns:
        matrices x owned compressed rows x r, fp32, orthonormal over all ranks.
    """
    momentum, new_share = rho * momentum, 1 - rho
    basis, lengths = yield shard.compressed.all_gather(own), shard.all_reduce(own.square().sum(1, keepdim=True))
    basis = with_lost_columns(shard, basis, lengths, seed, step)
    tall = yield shard.kept.reduce_scatter(product_with_error(shard, error, basis))
    tall = momentum + new_share * tall  # b Q
    held, sizes = yield shard.kept.all_gather(tall), shard.all_reduce(tall.abs().sum(1, keepdim=True))
    is_known = sizes > RANK_TOLERANCE * sizes.amax(2, keepdim=True)
    tall, held = (torch.where(is_known, x / sizes, 0.0) for x in (tall, held))
    small = shard.replicated_axis(tall.shape[2])
    wide, mixed = yield (
        shard.compressed.reduce_scatter(product_with_error(shard, error, held, transposed=True)),
        small.reduce_scatter(shard.local_contribution(momentum.mT @ tall)),
    )
    mixed = shard.or_zeros((yield small.all_gather(mixed)), tall.shape[2])
    wide = yield shard.compressed.gather_to_root(own @ mixed + new_share * wide)  # b^T b Q
    new: torch.Tensor = yield shard.compressed.scatter_from_root(orthonormal_beside_zeros(wide))
    return new


def follow_gram(
    shard: MatrixShard,
    old: torch.Tensor,
    gram: torch.Tensor,
    beta: float,
    found: ProjectedGradient,
    seed: int,
    step: int,
) -> Program[tuple[torch.Tensor, torch.Tensor]]:
    """``qr(beta Q S + (1 - beta) H^T H Q)``, on the root of each matrix, and all of ``S``.

    ``Q S Q^T`` is the average of ``H^T H`` so far. What is sent is of the gradient over its safe scale.

    Args:
        shard: the stack.
        old: ``Q``: matrices x compressed x r, fp32.
        gram: ``S`` as it is stored.
        beta: the share of the average.
        found: with whole rows of the gradient: matrices x owned kept rows x compressed, fp32.
        seed: of the random numbers in the place of columns of zeros.
        step: the number of steps so far.

    Returns:
        matrices x compressed x r and matrices x r x r, fp32; zeros on a rank without a part of the matrices.
    """
    size, rank, scale = shard.compressed.size, old.shape[2], found.safe_scale
    lengths, axis = old.square().sum(1, keepdim=True), shard.replicated_axis(size)
    with products_in(shard.precision, shard.device):
        tall = found.projected @ with_lost_columns(shard, old, lengths, seed, step, (0, size)) / scale
        wide = found.projected.mT @ tall / scale  # H^T H Q
    wide, energies, gram = yield (
        axis.reduce_to_root(shard.local_contribution(wide)),
        shard.all_reduce(tall.square().sum(1, keepdim=True)),
        shard.replicated_axis(rank).all_gather(gram),
    )
    gram = shard.or_zeros(gram, rank)
    held, share = shard.of_rooted(gram).double(), (1 - beta) * shard.of_rooted(scale).double().square()
    total = beta * shard.of_rooted(old).double() @ held + share * wide
    energies = beta * torch.diagonal(held, dim1=1, dim2=2).unsqueeze(1) + share * shard.of_rooted(energies)
    is_known = energies > RANK_TOLERANCE**2 * energies.amax(2, keepdim=True)
    norms = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    columns = torch.where(is_known & (norms > 0), total / norms, 0.0)
    new = yield axis.broadcast_from_root(orthonormal_beside_zeros(columns.float()))
    return shard.or_zeros(new, size), gram
