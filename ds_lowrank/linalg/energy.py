"""How much of a matrix's squared norm a subspace captures, the smallest subspace that captures enough, singular pairs.

Everything here is of a stack of L matrices, and nothing waits for the device or depends on what a matrix's neighbors
are.
"""

from __future__ import annotations

import torch

from ds_lowrank.linalg.orthonormal import RANK_TOLERANCE, orthonormal

RESOLUTION = 1e-6
"""A residual below this share of the squared norm is fp32 rounding."""


def spectrum(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values and right singular vectors of tall matrices.

    Args:
        tall: L x p x k, fp32, p >= k.

    Returns:
        The singular values, L x k, descending, and the right singular vectors as columns, L x k x k; fp64. Both are NaN
        for a matrix that is not finite or whose iteration does not converge, because an exception on the root would
        leave the other ranks waiting.
    """
    finite = tall.isfinite().all(-1).all(-1)
    triangles = torch.linalg.qr(torch.where(finite[:, None, None], tall, 0), mode="r").R.double()
    values, vectors = _singular(triangles)
    failed = ~finite
    return values.masked_fill(failed[:, None], torch.nan), vectors.masked_fill(failed[:, None, None], torch.nan)


def singular_pairs(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The left and right singular vectors of tall matrices, each in the column of its singular value: ``A V = F S``.

    The largest entry of a right vector is positive, so that the signs are a matter of neither layout nor library. The
    order of pairs whose singular values are equal up to rounding still is, and so is their rotation among themselves.

    Args:
        tall: A, L x p x k, fp32, p >= k.

    Returns:
        F, L x p x k, and V, L x k x k; fp32, with columns that are orthonormal or, in both, zero: those of a singular
        value that is rounding. NaN for a matrix that is not finite or whose iteration does not converge, as above.
    """
    largest = tall.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(tall.dtype).tiny)
    finite = tall.isfinite().all(-1).all(-1)[:, None, None]
    q, triangles = torch.linalg.qr(torch.where(finite, tall / largest, 0))
    triangles = triangles.double()
    values, vectors = _singular(triangles)
    finite = finite & values.isfinite().all(-1)[:, None, None]
    is_live = (values > RANK_TOLERANCE * values[:, :1]).unsqueeze(1)
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    right = torch.where(is_live, signs * vectors, 0)
    left = q.double() @ (triangles @ right / torch.where(is_live, values.unsqueeze(1), 1))
    left = torch.where((tall != 0).any(-1, keepdim=True), left, 0)
    return torch.where(finite, left, torch.nan).float(), torch.where(finite, right, torch.nan).float()


def _singular(square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values and right singular vectors of L x k x k; NaN for matrices whose iteration does not converge."""
    try:
        _, values, transposed = torch.linalg.svd(square)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if len(square) == 1:
            return torch.full_like(square[:, 0], torch.nan), torch.full_like(square, torch.nan)
        alone = [_singular(matrix) for matrix in torch.split(square, 1)]
        return torch.cat([values for values, _ in alone]), torch.cat([vectors for _, vectors in alone])
    return values, transposed.mT


def smallest_rank(values: torch.Tensor, whole: torch.Tensor, residual_tol: float) -> torch.Tensor:
    """The smallest number of leading directions whose residual is at most a share of the squared norm.

    Args:
        values: singular values within each subspace, L x k, descending, fp64.
        whole: squared Frobenius norm of each whole matrix, L, fp64.
        residual_tol: the largest allowed share of the squared norm; at least ``RESOLUTION`` is used.

    Returns:
        A rank from 1 to ``k + 1`` for each matrix, L, int64; the latter means that all of the directions are not
        enough.
    """
    squares = values.square().unsqueeze(-2)
    captured = squares.expand(-1, values.shape[-1], -1).tril().sum(-1)  # cumsum is not deterministic on every CUDA
    residual = whole.unsqueeze(-1) - captured
    return (residual > max(residual_tol, RESOLUTION) * whole.unsqueeze(-1)).sum(-1) + 1


def numerical_rank(values: torch.Tensor) -> torch.Tensor:
    """Number of singular values of each matrix that are more than fp32 rounding.

    Args:
        values: singular values, L x k, descending, k >= 1.

    Returns:
        L, int64.
    """
    return (values > RANK_TOLERANCE * values[:, :1]).sum(-1)


def leading_coordinates(vectors: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Orthonormal bases of the spans of the first few of orthonormal vectors.

    The vectors themselves would do, but their signs, and their order where singular values are close, are accidents of
    rounding. This basis is a continuous function of the subspace alone.

    Args:
        vectors: L x k x k, orthonormal columns.
        ranks: how many of the columns of each matrix span its subspace: L, int64.

    Returns:
        L x k x k, fp32, whose columns from each rank on are zero; NaN for a matrix whose vectors are.
    """
    is_leading = torch.arange(vectors.shape[-1], device=vectors.device) < ranks.unsqueeze(-1)
    leading = torch.where(is_leading.unsqueeze(-2), vectors, 0)
    projector = torch.where(is_leading.unsqueeze(-2), leading @ leading.mT, 0)
    return orthonormal(projector).float()
