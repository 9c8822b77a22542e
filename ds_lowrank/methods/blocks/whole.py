"""Whole rows of a gradient and all rows of a basis, for methods that keep a momentum of whole size."""

from __future__ import annotations

import torch

from ds_lowrank.sharding.elementwise import blocks
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program


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
