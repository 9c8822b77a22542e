"""What a subspace leaves out of the gradient, ``H - R Q^T``, as part of an update.

It is never stored, and formed only where a piece of the weights is written.
"""

from __future__ import annotations

import torch

from ds_lowrank.linalg.energy import RESOLUTION
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.elementwise import along
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Factors


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


def rest_squares(squares: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    """``|H_i - R_i Q^T|^2`` for each kept row i, with an orthonormal ``Q``: ``|H_i|^2 - |R_i|^2``; 0 if it is rounding.

    Args:
        squares: ``|H_i|^2``: matrices x owned kept rows x 1, fp32.
        projected: ``R``: matrices x owned kept rows x r, fp32, over the same factor.
    """
    rest = squares - projected.square().sum(2, keepdim=True)
    return torch.where(rest > RESOLUTION * squares, rest, 0.0)
