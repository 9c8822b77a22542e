"""The only way in which new weights get into a stack: computed in fp32, and rounded once to the weights' own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.matrix import MatrixShard


@contextmanager
def changed(shard: MatrixShard, piece: Piece, decay: float = 0.0) -> Iterator[torch.Tensor]:
    """Change weights in fp32, after their decay, and round them once.

    Args:
        shard: the stack; its ``rounding`` says how.
        piece: of its weights, any floating dtype, changed in place.
        decay: the share of them that is taken away.

    Returns:
        The weights, to be changed in place: matrices x rows x columns, fp32.
    """
    fp32 = piece.values.float()
    if decay:
        fp32.mul_(1 - decay)
    yield fp32
    if fp32 is not piece.values:
        write(shard, piece, fp32)


def write(shard: MatrixShard, piece: Piece, values: torch.Tensor) -> None:
    """Replace weights. In bf16 the stack's ``rounding`` rounds them; otherwise they are rounded to the nearest.

    Args:
        shard: the stack.
        piece: of its weights, any floating dtype.
        values: the new weights: matrices x rows x columns, fp32.
    """
    if shard.rounding is None or piece.values.dtype != torch.bfloat16:
        piece.values.copy_(values)
    else:
        shard.rounding.write(piece, values)
