"""The norm-growth limiter of Fira (Chen et al., arXiv 2410.01623), which APOLLO and SUMO took over."""

from __future__ import annotations

import torch

from ds_lowrank.methods.blocks.state_spec import State, TensorSpec
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program


def norm_spec(shard: MatrixShard) -> TensorSpec:
    """The spec of the norm of the last step's ``S``: one number for each matrix."""
    return TensorSpec(shard.replicated_axis(1), 1)


def limit_growth(
    shard: MatrixShard, state: State, key: str, gamma: float | None, squares: torch.Tensor
) -> Program[torch.Tensor]:
    """The factor by which ``S`` is shortened: ``gamma |S_before| / |S|`` if ``|S| > gamma |S_before|``, else 1.

    A norm of zero before, as in the first step, limits nothing.

    Args:
        shard: the stack.
        state: with ``|S_before|``, which becomes the norm of the limited ``S``.
        key: of ``|S_before|`` in the state.
        gamma: how much a norm may grow in one step; None for any.
        squares: this rank's contribution to ``|S|^2``: matrices x 1 x 1, fp32.

    Returns:
        matrices x 1 x 1, fp32, the same bits on all ranks.
    """
    if gamma is None:
        return torch.ones_like(squares)
    squares, before = yield shard.all_reduce(squares), shard.replicated_axis(1).all_gather(state[key])
    norm, allowed = squares.sqrt(), gamma * shard.or_zeros(before, 1)
    factor = torch.where((allowed > 0) & (norm > allowed), allowed / norm, 1.0)
    state[key].copy_((norm * factor).expand_as(state[key]))
    return factor
