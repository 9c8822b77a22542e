"""What Tandem promises of one step: its length, what decides its direction, and its limits."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.tandem import DenseTandem
from tests.unit.references.common import SIDES, close, gaussian, zeros


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (30, 30)])
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_an_update_has_a_root_mean_square_of_a_fifth_of_the_rate(shape, rank):
    """Both parts of it, of whose cosine nothing is left: rows of the rest are orthogonal to the basis."""
    weight = zeros(*shape)
    DenseTandem(weight, rank=rank, lr=0.5, max_relative_step=None).step(gaussian(*shape))
    assert abs(weight.square().mean().sqrt() - 0.2 * 0.5) < 1e-9


@pytest.mark.parametrize("lr", [1.0, 1e3])
@pytest.mark.parametrize("size, longest", [(0.0, 1e-4), (2e-2, 2e-3), (10.0, 1.0)])
def test_the_longest_step_is_a_share_of_the_weights(lr, size, longest):
    """Weights of zeros count as 0.001, and a short step is not made longer."""
    before = size * torch.ones(12, 8, dtype=torch.float64)
    weight = before.clone()
    DenseTandem(weight, rank=3, lr=lr, max_relative_step=0.1).step(gaussian(12, 8))
    step = (weight - before).square().mean().sqrt()
    assert abs(step / min(0.2 * lr, longest) - 1) < 1e-9


@pytest.mark.parametrize("shape", SIDES.values())
def test_the_size_of_a_gradient_decides_nothing(shape):
    one, other = zeros(*shape), zeros(*shape)
    first, second = DenseTandem(one, rank=3), DenseTandem(other, rank=3)
    for step in range(3):
        gradient = gaussian(*shape, seed=step)
        first.step(gradient)
        second.step(1e-6 * gradient)
    assert close(one, other)


def test_at_full_rank_without_momentum_it_is_the_polar_factor():
    weight, gradient = zeros(12, 8), gaussian(12, 8)
    DenseTandem(weight, rank=8, momentum=0.0, lr=1.0, max_relative_step=None).step(gradient)
    U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
    assert close(-weight, 0.2 * 12**0.5 * U @ Vh)


def test_all_rows_outside_the_subspace_have_one_length():
    weight, gradient = zeros(12, 8), gaussian(12, 8)
    dense = DenseTandem(weight, rank=3, lr=1.0)
    dense.step(gradient * torch.logspace(-3, 3, 12, dtype=torch.float64).unsqueeze(1))
    outside = weight - weight @ dense.Q @ dense.Q.T
    lengths = outside.norm(dim=1)
    assert close(lengths, lengths.mean().expand(12))
