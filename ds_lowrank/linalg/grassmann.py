"""Subspaces that move: a step along a geodesic of the Grassmannian, towards a matrix's leading subspace.

Everything here is of a stack of L matrices, and depends on subspaces alone: the signs of singular vectors cancel.
"""

from __future__ import annotations

import math

import torch

from ds_lowrank.linalg.orthonormal import orthonormal_beside_zeros

ROUNDING = 1e-5
"""What a product in fp32 has outside of a subspace counts as rounding if it is shorter than this, relative to it."""


def geodesic_step(basis: torch.Tensor, pull: torch.Tensor, step_size: torch.Tensor) -> torch.Tensor:
    """A step along the leading direction of the gradient of ``|H - H Q Q^T|^2``, downhill.

    Twice the part of ``H^T H Q`` that is orthogonal to ``Q`` is the downhill direction on the Grassmannian. Its leading
    singular triple ``sigma u v^T`` says which direction ``Q v`` of the subspace turns towards which ``u`` outside::

        Q <- Q + (cos(theta) - 1) Q v v^T + sin(theta) u v^T      theta = min(step_size * sigma, pi / 2)

    Beyond a right angle the geodesic comes back. A direction that is rounding alone is not followed.

    Args:
        basis: ``Q``: L x d x r, fp32, with columns that are orthonormal or zero.
        pull: ``H^T H X``: L x d x r, fp32, where ``X`` is ``Q`` with other columns in the place of those of zeros.
        step_size: times ``sigma`` the angle: L x 1 x 1, fp64.

    Returns:
        L x d x r, fp32; a column that was zero becomes what its own pull adds to the subspace, or stays zero. NaN for
        a matrix that is not finite. Matrices without elements (on ranks other than the root) are returned as they are.
    """
    if basis.numel() == 0:
        return basis
    q, toward = basis.double(), pull.double()
    is_known = (basis != 0).any(1, keepdim=True)
    lengths = torch.linalg.vector_norm(toward, dim=1, keepdim=True)
    for _ in range(2):  # the second time removes what rounding has left
        toward = toward - q @ (q.mT @ toward)
    sigma, u, v = leading_triple(2 * torch.where(is_known, toward, 0.0))
    known_length = torch.linalg.vector_norm(torch.where(is_known, lengths, 0.0), dim=2, keepdim=True)
    angle = torch.where(sigma > 2 * ROUNDING * known_length, (step_size * sigma).clamp(max=math.pi / 2), 0.0)
    turned = q + ((angle.cos() - 1) * (q @ v) + angle.sin() * u) @ v.mT
    is_new = ~is_known & (torch.linalg.vector_norm(toward, dim=1, keepdim=True) > ROUNDING * lengths)
    added = torch.where(is_new, toward / lengths, 0.0)
    added = orthonormal_beside_zeros((added - turned @ (turned.mT @ added)).float())
    return turned.float() + added + 0 * (basis + pull).sum((1, 2), keepdim=True)


def leading_triple(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular value and its vectors, by an eigendecomposition of the small Gram matrix.

    Args:
        matrix: L x d x r, fp64.

    Returns:
        ``sigma``, L x 1 x 1, ``u``, L x d x 1, and ``v``, L x r x 1; fp64. For a matrix that is not finite or zero all
        but ``v`` are zero. NaN if the iteration does not converge, because an exception on the root would leave the
        other ranks waiting.
    """
    largest = matrix.abs().amax((1, 2), keepdim=True)
    scaled = torch.where(largest.isfinite() & (largest > 0), matrix / largest, 0.0)
    try:
        _, vectors = torch.linalg.eigh(scaled.mT @ scaled)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        vectors = torch.full_like(scaled[:, : scaled.shape[2]], torch.nan)
    v = vectors[:, :, -1:]
    product = scaled @ v
    length = torch.linalg.vector_norm(product, dim=1, keepdim=True)
    u = torch.where(length == 0, 0.0, product / length)
    return length * largest.nan_to_num(0.0, 0.0, 0.0), u, v
