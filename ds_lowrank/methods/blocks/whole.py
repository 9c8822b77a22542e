"""Steps of whole size: rows of a gradient, all rows of a basis, and a momentum that is orthogonalized on its root."""

from __future__ import annotations

import torch

from ds_lowrank.linalg.orthonormal import PART_ELEMENTS
from ds_lowrank.methods.blocks.orthogonalize import Orthogonalization, newton_schulz, polar_factor
from ds_lowrank.methods.blocks.projection import safe_ratio
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.elementwise import blocks
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.precision import products_in
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense

ROUNDING = 1e-5
"""A rest of the momentum that is shorter than this, relative to all of it, is fp32 rounding, which NS would enlarge."""


def own_rows(shard: MatrixShard) -> Program[torch.Tensor]:
    """``H``: matrices x owned kept rows x compressed, fp32."""
    gradient: torch.Tensor = yield shard.kept.reduce_scatter(blocks(shard, shard.kept))
    return gradient


def everywhere(shard: MatrixShard, own: torch.Tensor) -> Program[torch.Tensor]:
    """All rows of ``P`` on every rank that has a part of the matrix: matrices x compressed x r, fp32.

    Args:
        shard: the stack.
        own: the rows that this rank owns.
    """
    size = shard.compressed.size
    rooted = yield shard.compressed.gather_to_root(own)
    return shard.or_zeros((yield shard.replicated_axis(size).broadcast_from_root(rooted)), size)


def whole_orthogonalized(shard: MatrixShard, momentum: torch.Tensor, rule: Orthogonalization) -> Program[torch.Tensor]:
    """Orthogonalize whole matrices, each on its root.

    Args:
        shard: the stack.
        momentum: ``M``: matrices x owned kept rows x compressed, fp32, of any size.
        rule: how.

    Returns:
        ``O``: matrices x held kept rows x compressed, fp32; zero for a matrix of zeros.
    """
    whole = yield shard.kept.gather_to_root(momentum)
    parts = torch.split(whole, max(1, PART_ELEMENTS // max(1, whole.shape[1] * whole.shape[2])))
    found = torch.cat([polar_factor(part) if rule == "exact" else newton_schulz(part) for part in parts])
    held: torch.Tensor = yield shard.kept.broadcast_from_root(found)
    return held


def whole_update(shard: MatrixShard, held: torch.Tensor, scale: float) -> Dense:
    """The update ``scale * O`` of whole matrices.

    Args:
        shard: the stack.
        held: ``O``: matrices x held kept rows x compressed, fp32.
        scale: factor on the update.
    """

    def elements(piece: Piece) -> torch.Tensor:
        r, by_rows = piece.rectangle, shard.side == "right"
        compressed = slice(r.col, r.col + r.width) if by_rows else slice(r.row, r.row + r.height)
        found = held[piece.matrices, shard.held(shard.kept, r), compressed]
        return found if by_rows else found.mT

    return Dense(elements, scale)


def orthogonalized_rest(momentum: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """``NS(M - M Q Q^T)`` of whole matrices, over its norm; zero where that rest is rounding.

    NS enlarges small singular values, and so what rounding leaves of ``Q`` in the rest: that is taken out again.

    Args:
        momentum: ``M``: matrices x kept x compressed, fp32.
        basis: ``Q``, orthonormal: matrices x compressed x r, fp32.

    Returns:
        matrices x kept x compressed, fp32.
    """
    with products_in("fp32", momentum.device):
        rest = momentum - momentum @ basis @ basis.mT
        found = newton_schulz(rest)
        found = found - found @ basis @ basis.mT
    whole, left, length = (
        torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64) for x in (momentum, rest, found)
    )
    return torch.where(left > ROUNDING * whole, safe_ratio(found, length.float()), 0.0)
