"""What a subspace leaves out of the gradient, ``H - R Q^T``, as part of an update.

It is never stored, and formed only where a piece of the weights is written. What a subspace holds of a row as a whole
leaves rounding errors, which differ from layout to layout. They are no rest.
"""

from __future__ import annotations

import torch

from ds_lowrank.linalg.energy import RESOLUTION
from ds_lowrank.methods.blocks.basis_options import BasisOptions
from ds_lowrank.methods.blocks.subspace import Projection
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.elementwise import along
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Factors

ROUNDING = 1e-6
"""What is shorter than this, relative to a row of the gradient, is fp32 rounding: about 16 times half a last place."""


def with_rest(
    shard: MatrixShard,
    direction: torch.Tensor,
    projected: torch.Tensor,
    basis: torch.Tensor,
    shares: torch.Tensor,
    scale: float,
) -> Program[Dense]:
    """The update ``scale * (N Q^T + diag(s) (H - R Q^T))``, as ``(N - diag(s) R) Q^T`` and ``diag(s) H``.

    Args:
        shard: the stack, with this step's gradient.
        direction: ``N``: matrices x owned kept rows x r, fp32.
        projected: ``R``, likewise.
        basis: ``Q``: matrices x held compressed rows x r, fp32.
        shares: ``s``, of the gradient as it is attached: matrices x owned kept rows x 1, fp32.
        scale: factor on the update.
    """
    held = yield shard.kept.all_gather(torch.cat([direction - shares * projected, shares], dim=2))
    factors, shares = Factors(held[..., :-1], basis, 1.0), held[..., -1:]

    def update(piece: Piece) -> torch.Tensor:
        gradient = shard.gradient.values_at(piece).float()
        return factors.lifted(shard, piece).addcmul_(gradient, along(shard, shard.kept, piece, shares))

    return Dense(update, scale)


def with_sign_of_rest(
    shard: MatrixShard,
    direction: torch.Tensor,
    projected: torch.Tensor,
    basis: torch.Tensor,
    row_norms: torch.Tensor,
    weight: float,
    scale: float,
) -> Program[Dense]:
    """The update ``scale * (N Q^T + weight * sign(H - R Q^T))``; the sign of an element that is rounding is 0.

    Args:
        shard: the stack, with this step's gradient.
        direction: ``N``: matrices x owned kept rows x r, fp32.
        projected: ``R``, likewise.
        basis: ``Q``: matrices x held compressed rows x r, fp32.
        row_norms: ``|H_i|``: matrices x owned kept rows x 1, fp32.
        weight: factor on the signs.
        scale: factor on the update.
    """
    rank = basis.shape[2]
    held = yield shard.kept.all_gather(torch.cat([direction, projected, ROUNDING * row_norms], dim=2))
    of_direction = Factors(held[..., :rank], basis, 1.0)
    of_projected, noise = Factors(held[..., rank:-1], basis, 1.0), held[..., -1:]

    def update(piece: Piece) -> torch.Tensor:
        rest = shard.gradient.values_at(piece).float() - of_projected.lifted(shard, piece)
        signs = rest.sign() * (rest.abs() > along(shard, shard.kept, piece, noise))
        return of_direction.lifted(shard, piece).add_(signs, alpha=weight)

    return Dense(update, scale)


def rest_squares(
    squares: torch.Tensor, projected: torch.Tensor, share: float = 1.0, gram: torch.Tensor | None = None
) -> torch.Tensor:
    """``|H_i - a R_i Q^T|^2 = |H_i|^2 - 2 a |R_i|^2 + a^2 |R_i Q^T|^2`` for each kept row i; 0 if it is rounding.

    Args:
        squares: ``|H_i|^2``: matrices x owned kept rows x 1, fp32.
        projected: ``R``: matrices x owned kept rows x r, fp32, over the same factor.
        share: ``a``.
        gram: ``Q^T Q``: matrices x r x r, fp32; None for an orthonormal ``Q``.
    """
    of_projected = projected.square().sum(2, keepdim=True)
    lifted = of_projected if gram is None else ((projected @ gram) * projected).sum(2, keepdim=True)
    rest = squares + (share**2 * lifted - 2 * share * of_projected)
    return torch.where(rest > RESOLUTION * squares, rest, 0.0)


def row_squares(
    shard: MatrixShard, options: BasisOptions, found: Projection, share: float = 1.0
) -> Program[tuple[torch.Tensor, torch.Tensor]]:
    """``|H_i|^2`` and ``|H_i - a R_i Q^T|^2`` for each kept row i, over the square of the safe scale.

    Args:
        shard: the stack, with this step's gradient.
        options: with ``basis_dtype``: a basis that was rounded is not quite orthonormal.
        found: with ``R``, and this rank's rows of ``Q``.
        share: ``a``.

    Returns:
        matrices x owned kept rows x 1 each, fp32.
    """
    squares = yield shard.kept.reduce_scatter(found.gradient_squares(shard, options))
    gram = None
    if options.basis_dtype != "fp32":
        gram = yield from shard.replicated_sum(found.own.mT @ found.own)  # Q^T Q
    return squares, rest_squares(squares, found.projected / found.safe_scale, share, gram)
