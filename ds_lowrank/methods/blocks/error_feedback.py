"""Error feedback: what a compressed step leaves out of the gradient is kept, and added to the next gradient.

The buffer has a number for every element of the matrix, which the rank that holds the element stores.
"""

from __future__ import annotations

import torch

from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.state_spec import State, TensorSpec
from ds_lowrank.sharding.elements import Elements
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Factors


def error_spec(shard: MatrixShard, options: Options) -> TensorSpec:
    """The spec of the buffer ``E``: elements x 1, stored in ``state_dtype``.

    Args:
        shard: the stack.
        options: with ``state_dtype``.
    """
    return options.first_moment_spec(shard.elements, 1)


def held_error(shard: MatrixShard, state: State, key: str) -> Program[Elements]:
    """The buffer where this rank's elements are. Nothing is exchanged unless ranks share a quantized block.

    Args:
        shard: the stack.
        state: with the buffer, elements x 1.
        key: of the buffer in the state.
    """
    held = state[key]
    if shard.geometry.block_rows > 1:
        held = yield shard.elements.all_gather(held)
    return Elements([held.squeeze(2)], [len(shard)], shard.part.rectangles)


def keep_error(shard: MatrixShard, state: State, key: str, error: Elements, taken: Factors) -> Program[None]:
    """Store what this step leaves over: ``E <- H + E - taken``.

    Args:
        shard: the stack, with this step's gradient.
        state: with the buffer, which is replaced.
        key: of the buffer in the state.
        error: ``E`` as :func:`held_error` returned it, changed in place.
        taken: the part of ``H + E`` that goes into the step.
    """
    for piece in shard.gradient.dense_pieces:
        left = error.values_at(piece)
        left.add_(shard.gradient.values_at(piece)).sub_(taken.dense(shard, piece))
    if shard.geometry.block_rows > 1:
        (held,) = error.runs
        state[key].copy_((yield shard.elements.reduce_scatter(held.unsqueeze(2))))


def product_with_error(
    shard: MatrixShard, error: Elements | None, factor: torch.Tensor, transposed: bool = False
) -> torch.Tensor:
    """This rank's contribution to ``(H + E) @ factor``, or to ``(H + E)^T @ factor``.

    Args:
        shard: the stack, with this step's gradient.
        error: ``E``, or None.
        factor: matrices x held compressed rows x r, fp32; transposed: matrices x held kept rows x r.
        transposed: whether ``H + E`` is.

    Returns:
        matrices x held kept rows x r, fp32; transposed: matrices x held compressed rows x r.
    """
    product = shard.transposed_times(factor) if transposed else shard.times(factor)
    return product if error is None else product.add_(shard.product(error, factor, transposed=transposed))
