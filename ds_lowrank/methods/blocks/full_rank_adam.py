"""Adam with two moments of every element, which are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_lowrank.linalg.moments import adam, adam_in_place
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.sharding.elements import Elements, Piece
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Update


def full_rank_state(shard: MatrixShard, options: Options) -> StateSpec:
    """The state of Adam at full rank: a first and a second moment of every element.

    Args:
        shard: the stack, or a parameter of any shape as one row.
        options: with ``state_dtype``, in which the moments are stored.

    Returns:
        ``exp_avg`` and ``exp_avg_sq``, elements x 1 each, of each matrix.
    """
    return {
        "exp_avg": options.first_moment_spec(shard.elements, 1),
        "exp_avg_sq": options.second_moment_spec(shard.elements, 1),
    }


def full_rank_adam(
    shard: MatrixShard, state: State, options: Options, gradient: Callable[[Piece], torch.Tensor]
) -> Program[Update]:
    """Adam's direction for every element (Kingma and Ba, Algorithm 1), as an update of the weights.

    Each rank steps the elements it holds, so nothing is exchanged, except if moments are quantized in blocks and two
    ranks share a block.

    Args:
        shard: the stack, or a parameter of any shape as one row.
        state: with ``exp_avg`` and ``exp_avg_sq``, which are updated in place, and ``step``, the number of steps before
            this one.
        options: with ``betas``, ``eps`` and its place.
        gradient: computes the gradient where a piece of this rank's elements is, any floating dtype.

    Returns:
        The update on the elements that this rank holds, to be scaled by the learning rate.
    """
    moments, step = (state["exp_avg"], state["exp_avg_sq"]), state["step"] + 1
    eps = options.eps_at(step)
    if shard.geometry.block_rows == 1:

        def direction(piece: Piece) -> torch.Tensor:
            places = piece.rectangle.offset, piece.rectangle.height * piece.rectangle.width
            first, second = (moment[piece.matrices, :, 0].narrow(1, *places) for moment in moments)
            values = gradient(piece).float().reshape(first.shape)
            rows = zip(first, second, values, strict=True)  # a fused kernel needs tensors without gaps
            found = [adam(one, two, value, options.betas, eps, step) for one, two, value in rows]
            return torch.stack(found).view(piece.values.shape)

        return Dense(direction, 1.0)
    held = torch.empty(len(shard), shard.part.numel, 1, dtype=torch.float32, device=shard.device)
    elements = Elements([held.squeeze(2)], [len(shard)], shard.part.rectangles)
    for piece in shard.gradient.dense_pieces:
        elements.values_at(piece).copy_(gradient(piece))
    owned = yield shard.elements.reduce_scatter(held)
    held = yield shard.elements.all_gather(adam_in_place(*moments, owned, options.betas, eps, step))
    directions = Elements([held.squeeze(2)], [len(shard)], shard.part.rectangles)
    return Dense(directions.values_at, 1.0)
