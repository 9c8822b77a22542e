"""Which logical matrices a tensor-parallel rank's parameter is part of, read from the marks of its layer.

=================  ============================================================================
layers             marks on a parameter
=================  ============================================================================
megatron-core      ``tensor_model_parallel``, ``partition_dim``, ``partition_stride``
DeepSpeed AutoTP   ``ds_autotp_universal_checkpoint_meta``: its dimension and every rank's size
other              none: the parameter is whole on every tensor-parallel rank
=================  ============================================================================

A fused weight holds several logical matrices stacked along rows, once or periodically (``q q k v`` for every group of
heads). It is projected as these matrices, so that a fused and an unfused model take the same steps. A stack
(:mod:`ds_lowrank.placement.stacks`) holds the same matrix of several experts, each of which may be fused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.marks import AUTOTP, is_megatron_shard, megatron_stride
from ds_lowrank.placement.stacks import Stack, stack_of
from ds_lowrank.sharding.layout import Block, Range
from ds_lowrank.sharding.logical import Logical, Strip, concatenated_row

FUSION = "ds_lowrank_fusion"
"""The attribute of a parameter in which ``tag_fused`` stores a :class:`Fusion`."""


@dataclass(frozen=True)
class Fusion:
    """The matrices in a fused weight, stacked along rows; the sequence repeats until the weight is filled.

    Attributes:
        names: the name of each matrix.
        heights: the number of rows of each matrix in one period.
    """

    names: tuple[str, ...]
    heights: tuple[int, ...]


def logical_matrices(parameter: torch.Tensor, shape: tuple[int, ...], name: str, grid: Grid) -> list[Logical]:
    """The logical matrices that a parameter is part of: one, those of a fused weight, or those of a stack.

    Args:
        parameter: the parameter, for its marks; it may be emptied by ZeRO 3.
        shape: shape of the parameter on this tensor-parallel rank.
        name: the parameter's name in the model.
        grid: this rank's tensor-parallel group.

    Raises:
        ConfigError: if the marks say that the parameter is split but not how, or if it is declared fused and its rows
            or its split do not fit.
    """
    dim, sizes = split_of(parameter, shape, name, grid)
    stack = stack_of(parameter, shape)
    if stack is None:
        return _matrices(_fusion(parameter, shape), shape, dim, sizes, name, grid)
    return _stacked(stack, getattr(parameter, FUSION, None), shape, dim, sizes, name, grid)


def _matrices(
    fusion: Fusion | None, shape: tuple[int, ...], dim: int | None, sizes: tuple[int, ...], name: str, grid: Grid
) -> list[Logical]:
    """The logical matrices of a parameter that is not a stack, or of one matrix in a stack."""
    if fusion is not None:
        if dim == 1:
            raise ConfigError(
                f"{name} is declared to hold {fusion.names} stacked along rows, but tensor parallelism splits its "
                "columns: leave it whole, or split its rows"
            )
        return _fused(fusion, shape, sizes, name, grid)
    if dim is None:
        copies = (_whole(shape),) * grid.tensor_size
        return [Logical(name, shape, copies, grid.tensor_rank, "sharded" if grid.tensor_size == 1 else "replicated")]
    full = tuple(sum(sizes) if axis == dim else size for axis, size in enumerate(shape))
    if len(shape) != 2:
        rest = math.prod(size for axis, size in enumerate(shape) if axis != dim)
        strips = concatenated_row([size * rest for size in sizes])
        return [Logical(name, full, strips, grid.tensor_rank, "sharded")]
    ends = [0, *accumulate(sizes)]
    blocks = [Block(span, (0, full[1])) if dim == 0 else Block((0, full[0]), span) for span in pairwise(ends)]
    return [Logical(name, full, tuple((Strip(0, block),) for block in blocks), grid.tensor_rank, "sharded")]


def _stacked(
    stack: Stack,
    fusion: Fusion | None,
    shape: tuple[int, ...],
    dim: int | None,
    sizes: tuple[int, ...],
    name: str,
    grid: Grid,
) -> list[Logical]:
    """The logical matrices of a stack. The ranks share each of them, have copies of all, or each have some of them."""
    matrix = stack.matrix(shape)
    if dim == 0 and len(shape) == 3:
        return _dealt(_matrices(fusion, matrix, None, (), name, grid), sizes, name)
    inner, numels = None, [math.prod(matrix)] * grid.tensor_size
    if dim is not None:
        inner = dim - 1 if len(shape) == 3 else dim
        sizes = tuple(size * matrix[inner] // shape[dim] for size in sizes)  # of each matrix, not of all together
        numels = [math.prod(matrix) // matrix[inner] * size for size in sizes]
    return [
        _numbered(one, number, name, tuple(_moved(own, number * n) for own, n in zip(one.strips, numels, strict=True)))
        for number in range(stack.count)
        for one in _matrices(fusion, matrix, inner, sizes, name, grid)
    ]


def _dealt(alone: list[Logical], counts: tuple[int, ...], name: str) -> list[Logical]:
    """The matrices of a stack that is split between matrices, from those of one of them: rank t has ``counts[t]``."""
    numel, found = sum(math.prod(one.shape) for one in alone), []
    for number, (owner, nth) in enumerate((t, nth) for t, count in enumerate(counts) for nth in range(count)):
        for one in alone:
            strips = tuple(_moved(own, nth * numel) if t == owner else () for t, own in enumerate(one.strips))
            found.append(replace(_numbered(one, number, name, strips), placement="sharded"))
    return found


def _numbered(one: Logical, number: int, name: str, strips: tuple[tuple[Strip, ...], ...]) -> Logical:
    """A matrix of a stack, from how it would be named and placed without the others."""
    piece = str(number) if one.piece is None else f"{number}.{one.piece}"
    return replace(one, name=f"{name}.{piece}", piece=piece, strips=strips)


def _moved(strips: tuple[Strip, ...], by: int) -> tuple[Strip, ...]:
    """The same strips, some elements further back in the parameter."""
    return tuple(replace(strip, start=strip.start + by) for strip in strips)


def refuse_empty_shards(parameter: torch.Tensor, name: str) -> None:
    """Refuse a weight if AutoTP leaves a rank without any of it, as it does with fewer heads than ranks.

    Args:
        parameter: the parameter, for its marks.
        name: the parameter's name in the model.

    Raises:
        ConfigError: if a rank has none; on every rank, including those that have some.
    """
    meta = getattr(parameter, AUTOTP, None)
    if meta and 0 in (meta["partition_sizes"] or ()):
        raise ConfigError(
            f"{name}: AutoTP leaves a tensor-parallel rank without any of it (sizes {tuple(meta['partition_sizes'])}); "
            "set tensor_parallel.autotp_size to a divisor of the number of key-value heads"
        )


def piece_names(parameter: torch.Tensor, shape: tuple[int, ...], name: str) -> list[str]:
    """The names of the matrices in a fused weight or a stack, which patterns may match.

    Args:
        parameter: the parameter, for its marks.
        shape: shape of the parameter on this tensor-parallel rank.
        name: the parameter's name in the model.

    Returns:
        The names in order; none if the parameter is neither. Those of a stack number this rank's matrices from 0.
    """
    stack = stack_of(parameter, shape)
    if stack is not None:
        return [f"{name}.{number}" for number in range(stack.count)]
    fusion = _fusion(parameter, shape)
    return [] if fusion is None else [_piece_name(name, piece) for piece in fusion.names]


def split_of(parameter: Any, shape: tuple[int, ...], name: str, grid: Grid) -> tuple[int | None, tuple[int, ...]]:
    """The dimension along which a parameter is split over tensor-parallel ranks, and every rank's size along it.

    Args:
        parameter: the parameter, for its marks.
        shape: shape of the parameter on this tensor-parallel rank.
        name: the parameter's name in the model.
        grid: this rank's tensor-parallel group.

    Returns:
        The dimension and the sizes; ``(None, ())`` if the parameter is whole on every rank.

    Raises:
        ConfigError: if the marks say that the parameter is split but not how.
    """
    meta = getattr(parameter, AUTOTP, None)
    if grid.tensor_size == 1 or not (meta or is_megatron_shard(parameter)):
        return None, ()
    if meta:
        if meta["replicated"] or meta["partition_dim"] is None:
            return None, ()
        sizes = meta["partition_sizes"]
        if sizes is None or meta["sub_param_sizes"] is not None or len(sizes) != grid.tensor_size:
            raise ConfigError(
                f"{name}: AutoTP splits this weight into pieces that ds_lowrank cannot read; exclude it from AutoTP by "
                "tensor_parallel.partition_config, or use a model whose projections are not fused"
            )
        return int(meta["partition_dim"]), tuple(sizes)
    dim = getattr(parameter, "partition_dim", -1)
    if not 0 <= dim < len(shape):
        raise ConfigError(
            f"{name} is marked tensor_model_parallel, but partition_dim does not say how it is split: use "
            "megatron-core's layers, or set partition_dim on the parameter"
        )
    return dim, (shape[dim],) * grid.tensor_size


def _fusion(parameter: Any, shape: tuple[int, ...]) -> Fusion | None:
    """How a parameter is fused, as declared or as megatron-core's stride implies; None if it is not."""
    if len(shape) != 2:
        return None
    declared: Fusion | None = getattr(parameter, FUSION, None)
    stride = megatron_stride(parameter)
    if declared is None and stride > 1 and getattr(parameter, "partition_dim", -1) == 0:
        return Fusion(tuple(map(str, range(stride))), (shape[0] // stride,) * stride)
    return declared


def _fused(fusion: Fusion, shape: tuple[int, ...], sizes: tuple[int, ...], name: str, grid: Grid) -> list[Logical]:
    """The matrices of a fused weight: the whole weight repeats its period, and the ranks' rows follow rank by rank."""
    period, width = sum(fusion.heights), shape[1]
    ends = [0, *accumulate(sizes or shape[:1])]
    if ends[-1] % period:
        raise ConfigError(
            f"{name}: {ends[-1]} rows are not a multiple of the {period} rows of {fusion.names}: correct the heights "
            "given to tag_fused"
        )
    periods = ends[-1] // period
    own = list(pairwise(ends)) if sizes else [(0, shape[0])] * grid.tensor_size
    found = []
    for piece, height, end in zip(fusion.names, fusion.heights, accumulate(fusion.heights), strict=True):
        rows = [(p * period + end - height, p * height) for p in range(periods)]
        strips = tuple(_strips(rows, height, span, width) for span in own)
        placement: Literal["sharded", "replicated"] = "sharded" if sizes or grid.tensor_size == 1 else "replicated"
        found.append(
            Logical(
                name=_piece_name(name, piece),
                shape=(periods * height, width),
                strips=strips,
                own=grid.tensor_rank,
                placement=placement,
                piece=piece,
            )
        )
    return found


def _strips(rows: list[tuple[int, int]], height: int, own: Range, width: int) -> tuple[Strip, ...]:
    """The strips of one matrix in one rank's rows of a fused weight.

    Args:
        rows: for every period, the row of the weight at which the matrix begins, and which of its own rows that is.
        height: number of rows of the matrix in one period.
        own: the rank's range of rows of the weight.
        width: number of columns.
    """
    found = []
    for first, row in rows:
        lo, hi = max(first, own[0]), min(first + height, own[1])
        if lo < hi:
            found.append(Strip((lo - own[0]) * width, Block((row + lo - first, row + hi - first), (0, width))))
    return tuple(found)


def _piece_name(name: str, piece: str) -> str:
    """The full name of a matrix in a fused weight. With a dot in it, its name is a full name already."""
    return piece if "." in piece else f"{name}.{piece}"


def _whole(shape: tuple[int, ...]) -> tuple[Strip, ...]:
    """The only strip of a parameter that is not split; as one row if it is not a matrix."""
    rows, width = shape if len(shape) == 2 else (1, math.prod(shape))
    return (Strip(0, Block((0, rows), (0, width))),)
