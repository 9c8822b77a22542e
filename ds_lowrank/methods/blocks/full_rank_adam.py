"""Adam with two moments of every element, which are spread over ranks."""

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
    """The state of Adam at full rank: a first and a second moment of every element.

    Args:
        shard: the matrix, or a parameter of any shape as one row.
        options: with ``state_dtype``, in which the moments are stored.

    Returns:
        ``exp_avg`` and ``exp_avg_sq``, elements x 1 each.
    """
    return {
        "exp_avg": options.first_moment_spec(shard.elements, 1),
        "exp_avg_sq": options.second_moment_spec(shard.elements, 1),
    }


def full_rank_adam(
    shard: MatrixShard, state: State, options: Options, gradient: Callable[[], torch.Tensor]
) -> Program[Update]:
    """Adam's direction for every element (Kingma and Ba, Algorithm 1), as an update of the weights.

    Each rank steps the elements it holds, so nothing is exchanged, except if moments are quantized in blocks and two
    ranks share a block.

    Args:
        shard: the matrix, or a parameter of any shape as one row.
        state: with ``exp_avg`` and ``exp_avg_sq``, which are updated in place, and ``step``, the number of steps before
            this one.
        options: with ``betas`` and ``eps``.
        gradient: computes the gradient on the elements that this rank holds, flat, fp32.

    Returns:
        The update on the elements that this rank holds, to be scaled by the learning rate.
    """
    step = state["step"]

    def direction(owned: torch.Tensor) -> torch.Tensor:
        return adam(state["exp_avg"], state["exp_avg_sq"], owned, options.betas, options.eps, step + 1)

    if shard.block_rows == 1:
        return Dense(lambda: direction(gradient().unsqueeze(1)).squeeze(1), 1.0)
    owned = yield shard.elements.reduce_scatter(gradient().unsqueeze(1))
    held = yield shard.elements.all_gather(direction(owned))
    return Dense(lambda: held.squeeze(1), 1.0)
