"""Adafactor's second moment of a whole gradient (Shazeer and Stern, arXiv 1804.04235), in two factors.

    v_row, v_col <- averages of the means of H * H + eps1 over columns and over rows, b = 1 - t^-0.8
    U <- H / sqrt(v_row v_col^T / mean(v_row)),  U <- U / max(1, rms(U))

``U = diag(a) H diag(b)`` is the gradient with its rows and its columns scaled, and is not formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ds_lowrank.methods.blocks.inner_optimizers import Adafactor
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.sharding.elementwise import along, squared_norms, sum_of_squares
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program


class Normalised(NamedTuple):
    """``U = diag(a) H diag(b)``.

    Attributes:
        a: matrices x held kept rows x 1, fp32.
        b: matrices x held compressed rows x 1, fp32.
        projected: ``U P``: matrices x owned kept rows x r, fp32.
    """

    a: torch.Tensor
    b: torch.Tensor
    projected: torch.Tensor


def factored_spec(shard: MatrixShard) -> StateSpec:
    """The spec of ``v_row`` and ``v_col``: one fp32 number for each kept and each compressed row."""
    return {"row_mean": TensorSpec(shard.kept, 1), "column_mean": TensorSpec(shard.compressed, 1)}


def unchanged(shard: MatrixShard, projected: torch.Tensor) -> Normalised:
    """The gradient as it is, without a second moment: ``a`` and ``b`` are ones.

    Args:
        shard: the stack.
        projected: ``H P``: matrices x owned kept rows x r, fp32.
    """
    a, b = (
        torch.ones(len(shard), axis.held_rows, 1, dtype=torch.float32, device=shard.device)
        for axis in (shard.kept, shard.compressed)
    )
    return Normalised(a, b, projected)


def normalised(
    shard: MatrixShard, state: State, found: ProjectedGradient, projection: torch.Tensor
) -> Program[Normalised]:
    """Update the factors, and divide the gradient by the root of their product.

    Args:
        shard: the stack, with this step's gradient.
        state: with the factors, and the number of steps so far.
        found: says whether the gradient can be squared as it is.
        projection: ``P``: matrices x held compressed rows x r, fp32.
    """
    (kept, compressed), new_share = (shard.kept, shard.compressed), (state["step"] + 1) ** -Adafactor.DECAY
    squares = [squared_norms(shard, axis, shard.gradient, None, found.are_ordinary) for axis in (kept, compressed)]
    rows, columns = yield kept.reduce_scatter(squares[0]), compressed.reduce_scatter(squares[1])
    row_mean = state["row_mean"].lerp_(rows / compressed.size + Adafactor.TINY, new_share)
    column_mean = state["column_mean"].lerp_(columns / kept.size + Adafactor.TINY, new_share)
    row_mean, column_mean, total = yield (
        kept.all_gather(row_mean),
        compressed.all_gather(column_mean),
        shard.all_reduce(row_mean.sum((1, 2), keepdim=True)),
    )
    a, b = row_mean.rsqrt() * (total / kept.size).sqrt(), column_mean.rsqrt()
    pieces = (
        piece._replace(values=piece.values.float() * along(shard, kept, piece, a) * along(shard, compressed, piece, b))
        for piece in shard.gradient.dense_pieces
    )
    projected, total = yield (
        kept.reduce_scatter(a * shard.times(b * projection)),  # U P
        shard.all_reduce(sum_of_squares(shard, kept, pieces).sum((1, 2), keepdim=True)),
    )
    shortened = (total / (kept.size * compressed.size)).sqrt().div(Adafactor.CLIP).clamp_min(1.0)
    return Normalised(a / shortened, b, projected / shortened)
