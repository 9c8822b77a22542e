"""Sums and products over single elements of the matrices of a stack, for methods that need more than products."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.elements import Elements, Piece
from ds_lowrank.sharding.matrix import MatrixShard


def along(shard: MatrixShard, axis: Axis, piece: Piece, factors: torch.Tensor) -> torch.Tensor:
    """The numbers that belong to the rows (or columns) of a piece, shaped to multiply it.

    Args:
        shard: the stack.
        axis: its rows or columns.
        piece: of its elements.
        factors: matrices x held rows of the axis x 1.

    Returns:
        matrices x rows x 1, or matrices x 1 x columns.
    """
    numbers = factors[piece.matrices, shard.held(axis, piece.rectangle)]
    return numbers if axis is shard.rows else numbers.mT


def squared_norms(
    shard: MatrixShard,
    axis: Axis,
    elements: Elements,
    safe_scale: torch.Tensor | None = None,
    are_ordinary: bool = False,
) -> torch.Tensor:
    """This rank's contribution to the squared norms of the matrices' rows (or columns).

    Args:
        shard: the stack.
        axis: its rows or columns.
        elements: of the matrices, any floating dtype.
        safe_scale: divides the norms before they are squared, so that no square leaves the range of fp32: matrices x 1
            x 1, fp32. None for 1.
        are_ordinary: whether the squares of all elements, and their sums, are known to be in the range of fp32. Norms
            are then taken in fp32, without a copy of the elements in fp64.

    Returns:
        matrices x held rows of the axis x 1, fp32.
    """
    dim = 1 if axis is shard.rows else 0
    if (singles := elements.singles) is not None:
        dtype = torch.float32 if are_ordinary else torch.float64
        norms = torch.empty(len(shard), axis.held_rows, dtype=dtype, device=shard.device)
        for matrix, out in zip(singles, norms.unbind(), strict=True):
            torch.linalg.vector_norm(matrix, dim=dim, out=out, dtype=dtype)
        norms = norms.unsqueeze(2)
        return (norms if safe_scale is None else norms / safe_scale).square().float()
    return sum_of_squares(shard, axis, elements.pieces, safe_scale)


def sum_of_squares(
    shard: MatrixShard, axis: Axis, pieces: Iterable[Piece], safe_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The same as :func:`squared_norms` of elements that come piece by piece.

    Args:
        shard: the stack.
        axis: its rows or columns.
        pieces: all elements of the matrices, any floating dtype.
        safe_scale: as there.
    """
    sums = torch.zeros(len(shard), axis.held_rows, 1, dtype=torch.float32, device=shard.device)
    for piece in pieces:
        add_squared_norms(shard, axis, piece, sums, safe_scale)
    return sums


def add_squared_norms(
    shard: MatrixShard, axis: Axis, piece: Piece, sums: torch.Tensor, safe_scale: torch.Tensor | None = None
) -> None:
    """Add the squared norms of a piece's rows (or columns) to those of the stack, as in :func:`squared_norms`."""
    norms = torch.linalg.vector_norm(piece.values, dim=2 if axis is shard.rows else 1, dtype=torch.float64)
    scaled = norms.unsqueeze(2) if safe_scale is None else norms.unsqueeze(2) / safe_scale[piece.matrices]
    sums[piece.matrices, shard.held(axis, piece.rectangle)] += scaled.square().float()


def dots(shard: MatrixShard, axis: Axis, a: Elements, b: Elements) -> torch.Tensor:
    """This rank's contribution to the inner products of two tensors' rows (or columns).

    Args:
        shard: the stack.
        axis: its rows or columns.
        a: elements of one tensor, any floating dtype.
        b: elements of the other in the same runs, any floating dtype.

    Returns:
        matrices x held rows of the axis x 1, fp32.
    """
    dim = 1 if axis is shard.rows else 0
    if a.singles is not None and b.singles is not None:
        found = torch.empty(len(shard), axis.held_rows, dtype=torch.float32, device=shard.device)
        for one, other, out in zip(a.singles, b.singles, found.unbind(), strict=True):
            torch.sum(one * other, dim=dim, out=out)
        return found.unsqueeze(2)
    sums = torch.zeros(len(shard), axis.held_rows, 1, dtype=torch.float32, device=shard.device)
    for piece, other_piece in zip(a.pieces, b.pieces, strict=True):
        product = piece.values.float() * other_piece.values.float()
        sums[piece.matrices, shard.held(axis, piece.rectangle)] += product.sum(dim + 1).unsqueeze(2)
    return sums


def largest_magnitudes(shard: MatrixShard, elements: Elements | None = None) -> torch.Tensor:
    """The largest magnitude of this rank's elements of each matrix: matrices x 1 x 1, fp32; zero for no elements.

    Args:
        shard: the stack.
        elements: of the matrices, any floating dtype; None for the gradients.
    """
    found = torch.zeros(len(shard), 1, 1, dtype=torch.float32, device=shard.device)
    for piece in (shard.gradient if elements is None else elements).pieces:
        largest = piece.values.abs().amax((1, 2), keepdim=True).float()
        found[piece.matrices] = torch.maximum(found[piece.matrices], largest)
    return found


def blocks(shard: MatrixShard, axis: Axis) -> torch.Tensor:
    """The rows (or columns) of each gradient that this rank holds, with zeros for other ranks' elements.

    Args:
        shard: the stack, with this step's gradients attached.
        axis: its rows or columns.

    Returns:
        matrices x held rows x n or, along the columns, matrices x held columns x m; fp32.
    """
    by_rows = axis is shard.rows
    shape = len(shard), axis.held_rows, shard.shape[1 if by_rows else 0]
    found = torch.zeros(shape, dtype=torch.float32, device=shard.device)
    for piece in shard.gradient.pieces:
        r, values = piece.rectangle, shard.dense_gradient(piece)
        others = slice(r.col, r.col + r.width) if by_rows else slice(r.row, r.row + r.height)
        found[piece.matrices, shard.held(axis, r), others] = values if by_rows else values.mT
    return found
