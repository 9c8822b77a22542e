"""Dense Fira, against what analysis knows of it."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.fira import DenseFira
from ds_lowrank.reference.galore import DenseGaLore
from tests.unit.references.common import NEGLIGIBLE, SIDES, close, gaussian, zeros

SHAPES = pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)


@SHAPES
@pytest.mark.parametrize("residual", ["paper", "official"])
def test_with_plain_gradient_descent_in_the_subspace_it_is_gradient_descent(shape, residual):
    """phi is then one; ``official`` agrees where alpha is."""
    weight, expected = zeros(*shape), zeros(*shape)
    dense = DenseFira(weight, lr=0.1, rank=3, inner="sgd", scale=1.0, norm_growth_limit=None, residual=residual)
    for step in range(4):
        dense.step(gaussian(*shape, seed=step))
        expected -= 0.1 * gaussian(*shape, seed=step)
    assert close(weight, expected)


@SHAPES
def test_at_full_rank_it_is_galore(shape):
    weights = zeros(*shape), zeros(*shape)
    steppers = [kind(weight, rank=8) for kind, weight in zip((DenseFira, DenseGaLore), weights, strict=True)]
    for step in range(4):
        for dense in steppers:
            dense.step(gaussian(*shape, seed=step))
    assert close(*weights, tolerance=1e-6)


@SHAPES
def test_each_row_of_the_rest_has_the_length_ratio_of_its_projection(shape):
    """Adam's first direction is of signs: phi_i is √r over the norm of the row's projection."""
    weight, gradient = zeros(*shape), gaussian(*shape)
    dense = DenseFira(weight, rank=3, lr=1.0, scale=0.0, eps=NEGLIGIBLE)
    dense.step(gradient)
    S, H = (-weight, gradient) if dense.right else (-weight.T, gradient.T)
    R = H @ dense.basis
    assert close(S, 3**0.5 / R.norm(dim=1, keepdim=True) * (H - R @ dense.basis.T))


def test_ratio_of_uncorrected_moments_makes_a_difference_to_the_limiter_only():
    def weights(ratio_moments, limit):
        weight = zeros(12, 8)
        dense = DenseFira(weight, rank=3, eps=NEGLIGIBLE, norm_growth_limit=limit, ratio_moments=ratio_moments)
        for step in range(5):
            dense.step(gaussian(12, 8, seed=step))
        return weight

    assert close(weights("corrected", None), weights("uncorrected", None))
    assert not close(weights("corrected", 1.01), weights("uncorrected", 1.01), tolerance=1e-3)


def test_one_phi_of_the_matrix_leaves_the_rest_parallel():
    weight, gradient = zeros(12, 8), gaussian(12, 8)
    dense = DenseFira(weight, rank=3, lr=1.0, scale=0.0, scaling="matrix")
    dense.step(gradient)
    rest = gradient - gradient @ dense.basis @ dense.basis.T
    assert close(-weight, weight.norm() * rest / torch.linalg.matrix_norm(rest))
