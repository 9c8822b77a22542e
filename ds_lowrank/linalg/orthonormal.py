"""Orthonormal bases that are continuous functions of a matrix, and exact singular vectors."""

from __future__ import annotations

import torch

RANK_TOLERANCE = 1e-6
"""A direction shorter than this, relative to the longest one, is fp32 rounding."""
PART_ELEMENTS = 2**24
"""A stack is decomposed so many elements at a time, or one matrix: copies in fp64 take several times its memory."""
GRAM_TOLERANCE = 1e-4
"""The shortest new direction, relative to the longest, for which a Gram matrix in fp64 is exact enough."""


def orthonormal(tall: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns of a tall matrix, by Householder QR with a positive diagonal.

    The basis is a continuous function of the matrix: the same input up to rounding gives the same basis up to rounding.
    A column that depends linearly on those before it becomes zero. An arbitrary completion would be noise, different on
    every layout, that an adaptive optimizer scales to full size. For the same reason a row of zeros stays zero.

    Args:
        tall: p x k or a stack, L x p x k, fp32, ``p >= k``; returned as it is if it has no elements (on ranks other
            than the root).

    Returns:
        Same shape, fp32: columns that are orthonormal or zero; NaN for a matrix that is not finite.
    """
    if tall.numel() == 0:
        return tall
    if tall.ndim == 3 and tall.shape[0] > 1 and tall.numel() > PART_ELEMENTS:
        parts = torch.split(tall, max(1, PART_ELEMENTS // tall[0].numel()))
        return torch.cat([orthonormal(part) for part in parts])
    largest = tall.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(tall.dtype).tiny)
    q, diagonal = (_by_gram_matrix if tall.is_cuda else _by_householder)(tall / largest)
    lengths = diagonal.abs()
    independent = lengths > RANK_TOLERANCE * lengths.amax(-1, keepdim=True)
    unless_infinite = largest * 0  # NaN otherwise: finite entries over an infinite one would be an ordinary zero
    signs = (torch.sign(diagonal) * independent).unsqueeze(-2) + unless_infinite
    basis: torch.Tensor = q * signs * (tall != 0).any(-1, keepdim=True)
    return basis


def orthonormal_beside_zeros(tall: torch.Tensor) -> torch.Tensor:
    """As :func:`orthonormal`, where columns of zeros may stand before others.

    A decomposition puts an arbitrary vector in the place of a dependent column, and takes its direction from the
    columns behind it. Here columns of zeros are decomposed last, and are left zero.

    Args:
        tall: L x p x k, fp32, ``p >= k``.
    """
    if tall.numel() == 0:
        return tall
    zeros_last = (tall == 0).all(-2, keepdim=True).int().argsort(dim=-1, stable=True).expand_as(tall)
    return torch.zeros_like(tall).scatter_(-1, zeros_last, orthonormal(tall.gather(-1, zeros_last)))


def _by_householder(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The QR decomposition: Q, and the diagonal of R."""
    q, r = torch.linalg.qr(tall)
    return q, torch.diagonal(r, dim1=-2, dim2=-1)


def _by_gram_matrix(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by a Cholesky decomposition ``A^T A = R^T R`` in fp64, which a card has much faster than reflections.

    The Gram matrix has the square of the condition: in fp64 it still tells apart what fp32 does. Where a column nearly
    depends on those before it, that matrix is decomposed by reflections.
    """
    wide = tall.double()
    lower, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
    diagonal = torch.diagonal(lower, dim1=-2, dim2=-1)
    q = torch.linalg.solve_triangular(lower.mT, wide, upper=True, left=False).to(tall.dtype)
    found = diagonal.to(tall.dtype)
    weak = (failed != 0) | ~(diagonal.amin(-1) > GRAM_TOLERANCE * diagonal.amax(-1))
    if weak.any():  # one wait for the card, when a basis is found
        if tall.ndim == 2:
            return _by_householder(tall)
        q[weak], found[weak] = _by_householder(tall[weak])
    return q, found


def leading_singular_vectors(
    matrix: torch.Tensor, rank: int, side: str, waits: torch.Tensor | None = None
) -> torch.Tensor:
    """The first ``rank`` singular vectors of a matrix, by an exact SVD, or a sample of all.

    Args:
        matrix: m x n or a stack, L x m x n, fp32 or fp64; without elements on ranks other than the root.
        rank: number of vectors, at most ``min(m, n)``.
        side: ``right`` for right singular vectors, ``left`` for left ones.
        waits: None for the first ones; or a number above 0 for each singular vector, min(m, n) of each matrix. Those
            with the smallest quotients of it and of their singular values are taken, in their order. If the numbers
            are independent and exponentially distributed, that is a sample without replacement with probabilities
            proportional to the singular values.

    Returns:
        n x rank (right) or m x rank (left), of each matrix of a stack, fp32, with vectors as columns; 0 x rank for
        matrices without elements. Vectors of singular values that are rounding are zero, and so are entries that
        belong to a row or column of zeros. If the iteration does not converge in fp32, it is repeated in fp64 on the
        normalized matrix. The result is NaN if that does not converge either or the matrix is not finite, because an
        exception on the root would leave the other ranks waiting.
    """
    if matrix.numel() == 0:
        return matrix.new_zeros(*matrix.shape[:-2], 0, rank)
    if matrix.ndim == 3:
        own = [None] * len(matrix) if waits is None else waits.unbind()
        found = [leading_singular_vectors(one, rank, side, wait) for one, wait in zip(matrix, own, strict=True)]
        return torch.stack(found)
    if not matrix.isfinite().all():
        return matrix.new_full((matrix.shape[side == "right"], rank), torch.nan)
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.dtype == torch.float64:
            return matrix.new_full((matrix.shape[side == "right"], rank), torch.nan, dtype=torch.float32)
        return leading_singular_vectors(matrix.double() / matrix.abs().max(), rank, side, waits)
    chosen = slice(rank) if waits is None else _sample(s, waits)[:rank].sort().values
    vectors = vh[chosen].T if side == "right" else u[:, chosen]
    significant = s[chosen] > RANK_TOLERANCE * s[0]
    nonzero = (matrix != 0).any(0 if side == "right" else 1).unsqueeze(1)
    basis: torch.Tensor = (vectors * significant * nonzero).float().contiguous()
    return basis


def _sample(values: torch.Tensor, waits: torch.Tensor) -> torch.Tensor:
    """All indices, in the order in which they are drawn: what is rounding comes last."""
    relative = values / values[0].clamp_min(torch.finfo(values.dtype).tiny)
    drawn = torch.where(relative > RANK_TOLERANCE, waits / relative, torch.inf)
    return drawn.argsort(stable=True)
