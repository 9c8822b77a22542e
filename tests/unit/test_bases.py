"""The bases that GaLore can take instead of the leading subspace, and how many power steps find that."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.linalg.dct import dct_columns
from ds_lowrank.linalg.orthonormal import leading_singular_vectors
from ds_lowrank.reference.galore import dct_basis
from tests.simulated.harness import ShardedMatrix, flat_parts


def test_the_columns_of_the_dct_matrix_are_orthonormal():
    columns = torch.arange(37).unsqueeze(0)
    (whole,) = dct_columns(37, (0, 37), columns)
    assert (whole.T @ whole - torch.eye(37)).abs().max() < 1e-6
    part = dct_columns(37, (5, 9), torch.tensor([[36, 0], [4, 4]]))
    assert torch.equal(part, torch.stack([whole[5:9][:, [36, 0]], whole[5:9][:, [4, 4]]]))


def test_a_large_dct_matrix_is_as_exact_as_a_small_one():
    exact = dct_basis(torch.eye(2000, dtype=torch.float64), 2000)
    (found,) = dct_columns(2000, (0, 2000), torch.arange(2000).unsqueeze(0))
    assert (found - exact).abs().max() < 2e-9


def test_singular_vectors_are_drawn_with_probabilities_of_their_singular_values():
    """The first draw of 4000: 0.6, 0.3 and 0.1, and never the one that is rounding."""
    waits = torch.empty(4000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    matrices = torch.diag(torch.tensor([6.0, 3.0, 1.0, 1e-9])).expand(4000, -1, -1)
    drawn = leading_singular_vectors(matrices, 1, "right", waits).abs().squeeze(2).mean(0)
    assert torch.allclose(drawn, torch.tensor([0.6, 0.3, 0.1, 0.0]), atol=0.03)


def test_a_sample_as_large_as_the_matrix_is_all_singular_vectors():
    matrix, waits = torch.randn(9, 5), torch.rand(5) + 0.1
    leading, sampled = (leading_singular_vectors(matrix, 5, "right", each) for each in (None, waits))
    assert torch.equal(leading, sampled)


@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
def test_more_power_steps_capture_more_of_a_flat_spectrum(shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    energies = []
    for steps in range(4):
        captured = 0.0
        for seed in range(5):
            sharded = ShardedMatrix(
                "GaLore", torch.zeros(shape), flat_parts(shape, [100]), rank=4, power_steps=steps, seed=seed
            )
            sharded.step(gradient)
            rows = torch.cat([state["basis"] for state in sharded.states])
            projected = gradient @ rows if shape[0] > shape[1] else gradient.T @ rows
            captured += projected.square().sum().item()
        energies.append(captured)
    assert energies == sorted(energies)


def test_a_random_basis_is_new_at_every_refresh_and_in_a_gradient_of_zeros():
    sharded = ShardedMatrix(
        "GaLore", torch.zeros(9, 6), flat_parts((9, 6), [20]), rank=3, projector="random", update_proj_gap=2
    )
    bases = []
    for gradient in (torch.randn(9, 6), torch.randn(9, 6), torch.zeros(9, 6), torch.randn(9, 6)):
        sharded.step(gradient)
        bases.append(torch.cat([state["basis"].clone() for state in sharded.states]))
    assert torch.equal(bases[0], bases[1]) and torch.equal(bases[2], bases[3])
    assert (bases[0] - bases[2]).norm() > 0.1
    assert (bases[2].T @ bases[2] - torch.eye(3)).abs().max() < 1e-6
