"""How much of a matrix a subspace holds, and the smallest subspace that holds enough."""

from __future__ import annotations

import torch

from ds_lowrank.linalg.orthonormal import RANK_TOLERANCE, orthonormal

RESOLUTION = 1e-6
"""A residual below this share of the whole is fp32 rounding."""


def spectrum(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values and right singular vectors of a tall matrix.

    Args:
        tall: p x k, fp32, p >= k.

    Returns:
        k values, descending, and k x k vectors, one a column; fp64. NaN where ``tall`` is not finite, or where the
        iteration does not converge: an error on the one rank that factors would leave the others waiting.
    """
    k = tall.shape[1]
    nothing = tall.new_full((k,), torch.nan, dtype=torch.float64), tall.new_full((k, k), torch.nan, dtype=torch.float64)
    if not tall.isfinite().all():
        return nothing
    triangle = torch.linalg.qr(tall, mode="r").R
    try:
        _, values, transposed = torch.linalg.svd(triangle.double())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return nothing
    return values, transposed.T


def smallest_rank(values: torch.Tensor, whole: torch.Tensor, residual_tol: float) -> int:
    """The least number of leading directions that leave out at most a share of the squared norm.

    Args:
        values: singular values within the subspace, descending.
        whole: squared Frobenius norm of the whole matrix.
        residual_tol: the share; below RESOLUTION it counts as that.

    Returns:
        From 1 to one more than there are values, which says that not all of them are enough.
    """
    left_out = whole - values.square().cumsum(0)
    return int((left_out > max(residual_tol, RESOLUTION) * whole).sum()) + 1


def numerical_rank(values: torch.Tensor) -> int:
    """How many of some descending singular values are more than rounding."""
    return int((values > RANK_TOLERANCE * values[0]).sum())


def leading_coordinates(vectors: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal coordinates of the subspace that the first ``rank`` of some orthonormal vectors span.

    The vectors themselves would do, but their signs, and their order where singular values are close, are accidents of
    rounding. What is returned depends on the subspace alone, and continuously.

    Args:
        vectors: k x k.

    Returns:
        k x rank, fp32.
    """
    leading = vectors[:, :rank]
    return orthonormal(leading @ leading[:rank].T).float()
