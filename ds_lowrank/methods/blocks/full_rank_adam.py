"""Adam with two moments of full size, on elements that are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_lowrank.linalg.moments import adam
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Update


def full_rank_state(shard: MatrixShard, options: Options) -> StateSpec:
    """Both moments of every element."""
    return {
        "exp_avg": options.first_moment_spec(shard.elements, 1),
        "exp_avg_sq": options.second_moment_spec(shard.elements, 1),
    }


def full_rank_adam(
    shard: MatrixShard, state: State, options: Options, gradient: Callable[[], torch.Tensor]
) -> Program[Update]:
    """Adam's direction on single elements.

    Each rank steps the elements it holds, so nothing is exchanged, unless moments are quantized in blocks that two
    ranks share.

    Args:
        shard: the matrix.
        state: with both moments, which are updated, and ``step``, the number of steps so far.
        options: with ``betas`` and ``eps``.
        gradient: computes the gradient on the elements that this rank holds: flat, fp32.
    """
    step = state["step"]

    def direction(owned: torch.Tensor) -> torch.Tensor:
        return adam(state["exp_avg"], state["exp_avg_sq"], owned, options.betas, options.eps, step + 1)

    if shard.block_rows == 1:
        return Dense(lambda: direction(gradient().unsqueeze(1)).squeeze(1), 1.0)
    owned = yield shard.elements.reduce_scatter(gradient().unsqueeze(1))
    held = yield shard.elements.all_gather(direction(owned))
    return Dense(lambda: held.squeeze(1), 1.0)
