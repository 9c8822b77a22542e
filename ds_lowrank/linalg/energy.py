"""How much of a matrix's squared norm a subspace captures, and the smallest subspace that captures enough."""

from __future__ import annotations

import torch

from ds_lowrank.linalg.orthonormal import RANK_TOLERANCE, orthonormal

RESOLUTION = 1e-6
"""A residual below this share of the squared norm is fp32 rounding."""


def spectrum(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values and right singular vectors of a tall matrix.

    Args:
        tall: p x k, fp32, p >= k.

    Returns:
        The k singular values, descending, and the k x k right singular vectors as columns; fp64. Both are NaN if
        ``tall`` is not finite or the iteration does not converge, because an exception on the root would leave the
        other ranks waiting.
    """
    k = tall.shape[1]
    failed = tall.new_full((k,), torch.nan, dtype=torch.float64), tall.new_full((k, k), torch.nan, dtype=torch.float64)
    if not tall.isfinite().all():
        return failed
    triangle = torch.linalg.qr(tall, mode="r").R
    try:
        _, values, transposed = torch.linalg.svd(triangle.double())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return failed
    return values, transposed.T


def smallest_rank(values: torch.Tensor, whole: torch.Tensor, residual_tol: float) -> int:
    """The smallest number of leading directions whose residual is at most a share of the squared norm.

    Args:
        values: singular values within the subspace, descending, fp64.
        whole: squared Frobenius norm of the whole matrix, a scalar, fp64.
        residual_tol: the largest allowed share of the squared norm; at least ``RESOLUTION`` is used.

    Returns:
        A rank from 1 to ``len(values) + 1``; the latter means that all of the directions are not enough.
    """
    whole = whole.cpu()
    residual = whole - values.cpu().square().cumsum(0)  # on CUDA not every torch has a deterministic one
    return int((residual > max(residual_tol, RESOLUTION) * whole).sum()) + 1


def numerical_rank(values: torch.Tensor) -> int:
    """Number of singular values that are more than fp32 rounding.

    Args:
        values: singular values, descending, at least one.
    """
    return int((values > RANK_TOLERANCE * values[0]).sum())


def leading_coordinates(vectors: torch.Tensor, rank: int) -> torch.Tensor:
    """An orthonormal basis of the span of the first few orthonormal vectors.

    The vectors themselves would do, but their signs, and their order where singular values are close, are accidents of
    rounding. This basis is a continuous function of the subspace alone.

    Args:
        vectors: k x k, orthonormal columns.
        rank: how many of the columns span the subspace.

    Returns:
        k x rank, fp32.
    """
    leading = vectors[:, :rank]
    return orthonormal(leading @ leading[:rank].T).float()
