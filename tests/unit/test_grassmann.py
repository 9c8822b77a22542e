"""A geodesic step on the Grassmannian, and moments that are carried into another basis."""

from __future__ import annotations

import math

import pytest
import torch

from ds_lowrank.linalg.grassmann import geodesic_step
from ds_lowrank.linalg.moments import transport
from ds_lowrank.linalg.orthonormal import orthonormal, orthonormal_beside_zeros

ROUNDING = torch.finfo(torch.float32).eps


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pull_of(gradient, basis):
    return gradient.mT @ (gradient @ basis)


def moved(gradient, basis, eta):
    step_size = torch.full((len(basis), 1, 1), eta, dtype=torch.float64)
    return geodesic_step(basis, pull_of(gradient, basis), step_size)


def captured(gradient, basis):
    return (gradient @ basis).square().sum((1, 2))


def unit_gradients(count=3, kept=20, compressed=9, seed=1):
    gradient = normal(count, kept, compressed, seed=seed)
    return gradient / gradient.flatten(1).norm(dim=1)[:, None, None]


@pytest.mark.parametrize("eta", [0.01, 0.3, 100.0])
def test_the_basis_stays_orthonormal_and_turns_in_one_plane(eta):
    gradient, basis = unit_gradients(), orthonormal(normal(3, 9, 4))
    new = moved(gradient, basis, eta)
    assert (new.mT @ new - torch.eye(4)).abs().max() < 10 * ROUNDING
    cosines = torch.linalg.svdvals(basis.mT @ new)
    assert (cosines[:, :3] - 1).abs().max() < 10 * ROUNDING
    toward = pull_of(gradient, basis) - basis @ (basis.mT @ pull_of(gradient, basis))
    angles = (eta * 2 * torch.linalg.svdvals(toward)[:, 0]).clamp(max=math.pi / 2)
    assert (cosines[:, 3] - angles.cos()).abs().max() < 1e-5


def test_a_small_step_captures_more_of_the_gradient():
    gradient, basis = unit_gradients(), orthonormal(normal(3, 9, 4))
    for _ in range(200):
        new = moved(gradient, basis, 0.3)
        assert (captured(gradient, new) > captured(gradient, basis) - 10 * ROUNDING).all()
        basis = new
    best = torch.linalg.svdvals(gradient)[:, :4].square().sum(1)
    assert (captured(gradient, basis) > 0.98 * best).all()


def test_the_step_is_one_of_the_subspace_whatever_its_coordinates():
    gradient, basis = unit_gradients(), orthonormal(normal(3, 9, 4))
    turn = orthonormal(normal(3, 4, 4, seed=5))
    a, b = moved(gradient, basis, 0.5), moved(gradient, basis @ turn, 0.5)
    assert (a @ turn - b).abs().max() < 1e-5


@pytest.mark.parametrize("eta", [0.5, 1e30])
def test_a_subspace_that_has_the_whole_gradient_stays(eta):
    basis = orthonormal(normal(2, 9, 4))
    gradient = normal(2, 20, 4, seed=2) @ basis.mT
    assert torch.equal(moved(gradient, basis, eta), basis)
    full = orthonormal(normal(2, 9, 9))
    assert torch.equal(moved(normal(2, 20, 9), full, eta), full)


def test_columns_of_zeros_are_found_anew():
    """Here the first and the last, in the pull of random numbers; they move nothing else."""
    gradient, basis = unit_gradients(), orthonormal(normal(3, 9, 5))
    basis[:, :, [0, 4]] = 0
    start = torch.where((basis == 0).all(1, keepdim=True), normal(3, 9, 5, seed=7), basis)
    step_size = torch.full((3, 1, 1), 0.3, dtype=torch.float64)
    new = geodesic_step(basis, pull_of(gradient, start), step_size)
    assert (new.mT @ new - torch.eye(5)).abs().max() < 10 * ROUNDING
    alone = moved(gradient, basis[:, :, 1:4].contiguous(), 0.3)
    assert (new[:, :, 1:4] - alone).abs().max() < 10 * ROUNDING


def test_columns_of_zeros_stay_where_the_gradient_has_nothing_else():
    basis = orthonormal(normal(2, 9, 4))
    gradient = normal(2, 20, 4, seed=2) @ basis.mT
    basis = torch.cat([basis, torch.zeros(2, 9, 1)], dim=2)
    start = torch.cat([basis[:, :, :4], normal(2, 9, 1, seed=3)], dim=2)
    new = geodesic_step(basis, pull_of(gradient, start), torch.ones(2, 1, 1, dtype=torch.float64))
    assert torch.equal(new, basis)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_spoils_only_its_own_basis(bad):
    gradient, basis = unit_gradients(), orthonormal(normal(3, 9, 4))
    pull, step_size = pull_of(gradient, basis), torch.ones(3, 1, 1, dtype=torch.float64)
    clean = geodesic_step(basis, pull, step_size)
    pull[1, 2, 3] = bad
    found = geodesic_step(basis, pull, step_size)
    assert found[1].isnan().all()
    assert (found[[0, 2]] - clean[[0, 2]]).abs().max() < 10 * ROUNDING


def test_stacks_without_elements_are_returned():
    empty = torch.empty(0, 6, 3)
    assert geodesic_step(empty, empty, torch.ones(0, 1, 1, dtype=torch.float64)).shape == empty.shape
    assert orthonormal_beside_zeros(empty).shape == empty.shape


def test_columns_of_zeros_take_nothing_from_the_columns_behind_them():
    tall = normal(2, 9, 4)
    tall[0, :, 0] = tall[1, :, 2] = 0
    found = orthonormal_beside_zeros(tall)
    for one, matrix, live in zip(found, tall, ([1, 2, 3], [0, 1, 3]), strict=True):
        assert (one[:, live] - orthonormal(matrix[:, live])).abs().max() < 10 * ROUNDING
        assert one.norm(dim=0).count_nonzero() == 3


def moments_after(steps, betas=(0.9, 0.99)):
    first, second = torch.zeros(5, 3), torch.zeros(5, 3)
    for step in range(steps):
        gradient = normal(5, 3, seed=step)
        first.lerp_(gradient, 1 - betas[0])
        second.lerp_(gradient.square(), 1 - betas[1])
    return first, second


def test_moments_stay_in_a_basis_that_stays():
    first, second = moments_after(7)
    before = first.clone(), second.clone()
    transport(first, second, torch.eye(3), (0.9, 0.99), 7)
    assert torch.allclose(first, before[0]) and torch.allclose(second, before[1], rtol=1e-4)


def test_moments_are_a_mean_and_a_variance():
    """Equation by equation, in fp64."""
    betas, steps = (0.9, 0.99), 7
    first, second = (moment.double() for moment in moments_after(steps, betas))
    turn = orthonormal(normal(3, 3, seed=9)).double()
    mean, square = first / (1 - betas[0] ** steps), second / (1 - betas[1] ** steps)
    expected = (1 - betas[1] ** steps) * ((square - mean**2) @ turn**2 + (mean @ turn) ** 2).abs()
    moved_first, moved_second = first.clone(), second.clone()
    transport(moved_first, moved_second, turn, betas, steps)
    assert torch.allclose(moved_first, first @ turn)
    assert torch.allclose(moved_second, expected)
    assert (moved_second >= 0).all()
