"""Orthonormal bases that are continuous functions of a matrix, and exact singular vectors."""

from __future__ import annotations

import torch

RANK_TOLERANCE = 1e-6
"""A direction shorter than this, relative to the longest one, is fp32 rounding."""


def orthonormal(tall: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns of a tall matrix, by Householder QR with a positive diagonal.

    The basis is a continuous function of the matrix: the same input up to rounding gives the same basis up to rounding.
    A column that depends linearly on those before it becomes zero. An arbitrary completion would be noise, different on
    every layout, that an adaptive optimizer scales to full size. For the same reason a row of zeros stays zero.

    Args:
        tall: p x k, fp32, ``p >= k``; returned as it is if it has no rows (on ranks other than the root).

    Returns:
        p x k, fp32: columns that are orthonormal or zero; NaN if ``tall`` is not finite.
    """
    if tall.shape[0] == 0:
        return tall
    q, r = torch.linalg.qr(tall / tall.abs().max().clamp_min(torch.finfo(tall.dtype).tiny))
    diagonal = torch.diagonal(r)
    lengths = diagonal.abs()
    independent = lengths > RANK_TOLERANCE * lengths.max()
    basis: torch.Tensor = q * (torch.sign(diagonal) * independent) * (tall != 0).any(1, keepdim=True)
    return basis


def leading_singular_vectors(matrix: torch.Tensor, rank: int, side: str) -> torch.Tensor:
    """The first ``rank`` singular vectors of a matrix, by an exact SVD.

    Args:
        matrix: m x n, fp32 or fp64; without elements on ranks other than the root.
        rank: number of vectors, at most ``min(m, n)``.
        side: ``right`` for right singular vectors, ``left`` for left ones.

    Returns:
        n x rank (right) or m x rank (left), fp32, with vectors as columns; 0 x rank for a matrix without elements.
        Vectors of singular values that are rounding are zero, and so are entries that belong to a row or column of
        zeros. If the iteration does not converge in fp32, it is repeated in fp64 on the normalized matrix. The result
        is NaN if that does not converge either or the matrix is not finite, because an exception on the root would
        leave the other ranks waiting.
    """
    if matrix.numel() == 0:
        return matrix.new_zeros(0, rank)
    if not matrix.isfinite().all():
        return matrix.new_full((matrix.shape[side == "right"], rank), torch.nan)
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.dtype == torch.float64:
            return matrix.new_full((matrix.shape[side == "right"], rank), torch.nan, dtype=torch.float32)
        return leading_singular_vectors(matrix.double() / matrix.abs().max(), rank, side)
    vectors = vh[:rank].T if side == "right" else u[:, :rank]
    significant = s[:rank] > RANK_TOLERANCE * s[0]
    nonzero = (matrix != 0).any(0 if side == "right" else 1).unsqueeze(1)
    basis: torch.Tensor = (vectors * significant * nonzero).float().contiguous()
    return basis
