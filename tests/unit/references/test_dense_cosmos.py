"""The dense COSMOS: what follows from its equations."""

from __future__ import annotations

import math

import pytest
import torch

from ds_lowrank.reference.cosmos import DenseCosmos
from ds_lowrank.reference.gum import newton_schulz
from tests.unit.references.common import SIDES, close, gaussian, matrix_with, zeros


@pytest.mark.parametrize("proj_type", SIDES)
def test_every_element_of_an_update_is_the_scale_on_average(proj_type):
    m, n = SIDES[proj_type]
    weight = zeros(m, n)
    dense = DenseCosmos(weight, rank=3, lr=0.1, scale=0.5, proj_type=proj_type)
    for step in range(4):
        before = weight.clone()
        dense.step(10.0**step * gaussian(m, n, seed=step))
        assert math.isclose((weight - before).square().mean().sqrt(), 0.05, rel_tol=1e-9)


def test_at_full_rank_the_basis_diagonalises_the_average_of_squares():
    """``Q S Q^T`` is then the average of ``H^T H`` itself, and nothing is left for Muon."""
    dense, expected = DenseCosmos(zeros(12, 8), rank=8, beta3=0.9), zeros(8, 8)
    for step in range(5):
        gradient = gaussian(12, 8, seed=step)
        dense.step(gradient)
        expected = 0.9 * expected + 0.1 * gradient.T @ gradient
        assert close(dense.basis @ dense.S @ dense.basis.T, expected)
    assert not dense.of_rest(dense.M).any()


def test_a_gradient_that_stays_is_decomposed():
    """Q becomes its leading singular vectors, and S the squares of its singular values."""
    gradient = matrix_with([5.0, 3, 1, 0.5, 0.2, 0.1])
    dense = DenseCosmos(zeros(12, 8), rank=2, beta3=0.5)
    for _ in range(40):
        dense.step(gradient)
    vectors = torch.linalg.svd(gradient).Vh[:2].T
    assert close((dense.basis.T @ vectors).abs(), torch.eye(2, dtype=torch.float64), 1e-6)
    assert close(dense.S, torch.diag(torch.tensor([25.0, 9.0], dtype=torch.float64)), 1e-6)


def test_with_a_large_gamma_it_is_muon_outside_of_the_subspace():
    weight, gradient = zeros(12, 8), gaussian(12, 8)
    dense = DenseCosmos(weight, rank=3, lr=1.0, gamma=1e12)
    dense.step(gradient)
    Q = dense.basis
    muon = newton_schulz(gradient - gradient @ Q @ Q.T)
    assert close(weight, -0.2 * 96**0.5 * muon / muon.norm(), 1e-9)
    assert (weight @ Q).norm() < 1e-9 * weight.norm()
