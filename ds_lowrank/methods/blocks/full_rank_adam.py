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
    """Two moments of every element."""
    return {
        "exp_avg": options.first_moment_spec(shard.elements, 1),
        "exp_avg_sq": options.second_moment_spec(shard.elements, 1),
    }


def full_rank_adam(
    shard: MatrixShard, state: State, options: Options, step: int, gradient: Callable[[], torch.Tensor]
) -> Program[Update]:
    """Adam's direction. Each rank's elements are its own, so that nothing is sent, unless runs of them share a scale.

    Args:
        step: 0 for the first step.
        gradient: computes it for the elements that this rank holds, flat, fp32.
    """

    def direction(owned: torch.Tensor) -> torch.Tensor:
        return adam(state["exp_avg"], state["exp_avg_sq"], owned, options.betas, options.eps, step + 1)

    if shard.block_rows == 1:
        return Dense(lambda: direction(gradient().unsqueeze(1)).squeeze(1), 1.0)
    owned = yield shard.elements.reduce_scatter(gradient().unsqueeze(1))
    held = yield shard.elements.all_gather(direction(owned))
    return Dense(lambda: held.squeeze(1), 1.0)
