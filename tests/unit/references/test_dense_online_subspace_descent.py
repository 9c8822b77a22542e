"""Dense Online Subspace Descent, against what analysis knows of it."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.online_subspace_descent import DenseOnlineSubspaceDescent, pca_gradient, pca_loss
from tests.unit.references.common import NEGLIGIBLE, ROUNDING, SIDES, close, gaussian, matrix_with, zeros


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_full_rank_with_momentum_is_plain_momentum(shape):
    """A complete orthonormal basis is where the PCA loss is zero: SGD leaves it there."""
    plain = torch.nn.Parameter(gaussian(*shape, seed=3))
    weight = plain.detach().clone()
    oracle = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    dense = DenseOnlineSubspaceDescent(weight, scale=1.0, lr=0.1, inner="sgd", momentum=0.9, basis_optimizer="sgd")
    for step in range(6):
        plain.grad = gaussian(*shape, seed=10 + step)
        oracle.step()
        dense.step(plain.grad)
    assert close(weight, plain.detach())


@pytest.mark.parametrize("pca_lambda", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [0, 3, 6]], ids=["leading", "any"])
def test_pca_gradient_is_zero_at_singular_vectors(chosen, pca_lambda):
    gradient = gaussian(12, 8)
    gradient /= gradient.norm()
    _, _, vh = torch.linalg.svd(gradient)
    assert pca_gradient(vh[chosen].T, gradient, pca_lambda).norm() < ROUNDING


def test_pca_gradient_by_autograd_is_the_closed_form():
    """2 [Q R^T R + G^T R Q^T Q - 2 G^T R] + 4 lambda Q (Q^T Q - I), away from orthonormal bases."""
    gradient, q = gaussian(12, 8), gaussian(8, 3, seed=1)
    r, gram = gradient @ q, q.T @ q
    pull = gradient.T @ r
    expected = 2 * (q @ (r.T @ r) + pull @ gram - 2 * pull) + 0.4 * q @ (gram - torch.eye(3, dtype=torch.float64))
    assert close(pca_gradient(q, gradient, 0.1), expected)


@pytest.mark.parametrize("basis_init", ["svd", "randomized", "random"])
def test_first_gradient_improves_only_a_random_basis(basis_init):
    gradient = gaussian(12, 8)
    dense = DenseOnlineSubspaceDescent(zeros(12, 8), rank=3, lr=0.0, basis_init=basis_init)
    dense.step(gradient)
    first = dense.basis
    moving = DenseOnlineSubspaceDescent(zeros(12, 8), rank=3, lr=1e-3, basis_init=basis_init, eps=NEGLIGIBLE)
    moving.step(gradient)
    # Adam's first step is lr_P = 5 lr in every element.
    moved = torch.full_like(first, 5e-3 if basis_init == "random" else 0.0)
    assert torch.allclose((moving.basis - first).abs(), moved, atol=1e-12)


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_basis_descends_to_the_leading_subspace_of_a_fixed_gradient(shape):
    gradient = matrix_with([3.0, 2.0, 0.5, 0.2], *shape)
    options = {"basis_init": "random", "basis_optimizer": "sgd", "basis_lr_ratio": 1.0}
    dense = DenseOnlineSubspaceDescent(zeros(*shape), rank=2, lr=0.2, **options)
    for _ in range(300):
        dense.step(gradient)
    H = gradient if dense.right else gradient.T
    left_out = (0.5**2 + 0.2**2) / gradient.square().sum()
    assert pca_loss(dense.basis, H / H.norm(), 0.1).item() == pytest.approx(left_out.item(), rel=1e-9)


def test_zero_gradient_does_not_move_the_basis():
    dense = DenseOnlineSubspaceDescent(zeros(12, 8), rank=3, weight_decay=0.1)
    dense.step(gaussian(12, 8))
    before = dense.basis
    dense.step(zeros(12, 8))
    assert torch.equal(dense.basis, before)
