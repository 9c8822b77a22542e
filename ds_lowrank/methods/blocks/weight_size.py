"""How large the weights of a matrix are: their root mean square, for updates that are measured by it."""

from __future__ import annotations

import torch

from ds_lowrank.sharding.elementwise import squared_norms
from ds_lowrank.sharding.matrix import MatrixShard

SMALLEST_SIZE = 1e-3
"""The least root mean square that weights count as, Adafactor's eps2: weights of zeros would never move."""


def weight_squares(shard: MatrixShard) -> torch.Tensor:
    """This rank's contribution to ``|W|^2``: matrices x 1 x 1, fp32."""
    squares = squared_norms(shard, shard.kept, shard.weights, are_ordinary=True)
    return shard.once(squares).sum((1, 2), keepdim=True)


def size_of(shard: MatrixShard, squares: torch.Tensor) -> torch.Tensor:
    """The root mean square of each matrix's weights, at least ``SMALLEST_SIZE``.

    Args:
        shard: the stack.
        squares: ``|W|^2``: matrices x 1 x 1, fp32.

    Returns:
        Likewise.
    """
    return (squares / (shard.shape[0] * shard.shape[1])).sqrt().clamp_min(SMALLEST_SIZE)
