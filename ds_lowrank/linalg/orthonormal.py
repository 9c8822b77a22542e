"""Orthonormal bases."""

from __future__ import annotations

import torch

RANK_TOLERANCE = 1e-6
"""A direction shorter than this, relative to the longest, is fp32 rounding and not information."""


def orthonormal(tall: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns of ``tall``, a continuous function of it.

    Householder QR with the sign fixed by a positive diagonal, so that the same input up to rounding gives the same
    basis up to rounding. A column that depends linearly on those before it becomes zero: an arbitrary completion would
    be noise that an adaptive optimizer blows up to full size, and a different one on every layout. For the same reason
    a row of zeros stays one.

    Args:
        tall: p x k, fp32, ``p >= k``. With no rows (a rank that does not factor) it comes back as it is.

    Returns:
        p x k, fp32: orthonormal columns, or zero ones; NaN where ``tall`` is not finite.
    """
    if tall.shape[0] == 0:
        return tall
    q, r = torch.linalg.qr(tall / tall.abs().max().clamp_min(torch.finfo(tall.dtype).tiny))
    diagonal = torch.diagonal(r)
    lengths = diagonal.abs()
    alive = lengths > RANK_TOLERANCE * lengths.max()
    basis: torch.Tensor = q * (torch.sign(diagonal) * alive) * (tall != 0).any(1, keepdim=True)
    return basis


def leading_singular_vectors(matrix: torch.Tensor, rank: int, side: str) -> torch.Tensor:
    """The first ``rank`` singular vectors of a matrix, by an exact SVD.

    Args:
        matrix: m x n, fp32 or fp64. With no elements it stands for a rank that does not factor.
        rank: at most ``min(m, n)``.
        side: ``right`` for right singular vectors, ``left`` for left ones.

    Returns:
        n x rank (right) or m x rank (left), fp32. Vectors of singular values that are rounding are zero, and so are
        entries that belong to a row or column of zeros. Where the iteration does not converge in fp32 it is repeated in
        fp64 on the normalised matrix. NaN where that does not converge either, or the matrix is not finite: an error on
        the one rank that factors would leave the others waiting.
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
    alive = s[:rank] > RANK_TOLERANCE * s[0]
    used = (matrix != 0).any(0 if side == "right" else 1).unsqueeze(1)
    basis: torch.Tensor = (vectors * alive * used).float().contiguous()
    return basis
