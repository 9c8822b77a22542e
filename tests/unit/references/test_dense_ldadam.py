"""The dense LDAdam: what follows from its equations."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.ldadam import DenseLDAdam
from tests.unit.references.common import SIDES, close, gaussian, zeros


def momentum(dense):
    """M Q^T, kept x compressed."""
    return dense.adam.M @ dense.basis.T


@pytest.mark.parametrize("proj_type", SIDES)
def test_error_feedback_loses_nothing(proj_type):
    """``E + beta1 / (1 - beta1) M Q^T`` plus the sum of all momenta is the sum of all gradients."""
    m, n = SIDES[proj_type]
    dense = DenseLDAdam(zeros(m, n), rank=3, error_feedback=True, proj_type=proj_type)
    gradients, momenta = zeros(m, n), zeros(12, 8)
    for step in range(6):
        gradient = gaussian(m, n, seed=step)
        dense.step(gradient)
        gradients += gradient
        momenta += momentum(dense)
    beta1 = dense.betas[0]
    left = dense.E + beta1 / (1 - beta1) * momentum(dense)
    assert close(momenta + left, gradients if proj_type == "right" else gradients.T)


def test_at_full_rank_the_momentum_is_that_of_adam():
    dense, expected = DenseLDAdam(zeros(12, 8), rank=8), zeros(12, 8)
    for step in range(5):
        gradient = gaussian(12, 8, seed=step)
        dense.step(gradient)
        expected = 0.908 * expected + 0.092 * gradient
        assert close(momentum(dense), expected)


def test_without_momentum_the_basis_finds_a_subspace_that_stays():
    """A power iteration in each step: the gradient's leading singular vectors after a few."""
    dense = DenseLDAdam(zeros(12, 8), rank=2, rho=0.0)
    u, v = torch.linalg.qr(gaussian(12, 8)).Q, torch.linalg.qr(gaussian(8, 8, seed=1)).Q
    gradient = u * torch.tensor([5.0, 4, 1, 0.5, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64) @ v.T
    for _ in range(10):
        dense.step(gradient)
    assert close(dense.basis @ dense.basis.T, v[:, :2] @ v[:, :2].T, 1e-9)
