"""Dense AdaRankGrad, against what analysis knows of it."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.adarankgrad import DenseAdaRankGrad
from ds_lowrank.reference.galore import positive_qr
from tests.unit.references.common import SIDES, close, gaussian, matrix_with, zeros


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_captured_and_residual_energy_add_up_to_the_gradient(shape):
    gradient = gaussian(*shape)
    dense = DenseAdaRankGrad(zeros(*shape), rank_max=5, residual_tol=0.5)
    dense.step(gradient)
    H, Q = (gradient if dense.right else gradient.T), dense.basis
    assert close(Q.T @ Q, torch.eye(dense.rank, dtype=torch.float64))
    left_out = (H - H @ Q @ Q.T).square().sum()
    assert close(H.square().sum() - (H @ Q).square().sum(), left_out)
    assert left_out <= 0.5 * H.square().sum()


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_gradient_of_rank_k_gets_rank_k(shape, k):
    dense = DenseAdaRankGrad(zeros(*shape), residual_tol=0.0)
    dense.step(matrix_with([1.5**-i for i in range(k)], *shape))
    assert dense.rank == k


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"residual_tol": 0.5}, 1),
        ({"residual_tol": 0.2}, 2),  # 64, 16, 4 and 1 of 85: the tail beyond two is 5/85
        ({"residual_tol": 0.05}, 3),
        ({"residual_tol": 0.001}, 4),
        ({"residual_tol": 0.5, "rank_min": 3}, 3),
        ({"residual_tol": 0.5, "rank_multiple": 2}, 2),
        ({"residual_tol": 0.05, "rank_multiple": 2}, 4),
        ({"residual_tol": 0.001, "rank_max": 2}, 2),
        ({"residual_tol": 0.5, "rank_min": 6}, 4),  # no more directions than the gradient has
    ],
    ids=str,
)
def test_rank_is_the_smallest_within_the_tolerance(options, rank):
    dense = DenseAdaRankGrad(zeros(12, 8), **options)
    dense.step(matrix_with([8.0, 4.0, 2.0, 1.0]))
    assert dense.rank == rank


def test_rank_follows_the_gradient_and_may_be_kept_from_growing():
    ranks = {}
    for never_grow in (False, True):
        dense = DenseAdaRankGrad(zeros(12, 8), residual_tol=1e-3, update_proj_gap=1, never_grow=never_grow)
        ranks[never_grow] = []
        for k in (4, 2, 3):
            dense.step(matrix_with([1.0] * k))
            ranks[never_grow].append(dense.rank)
    assert ranks == {False: [4, 2, 3], True: [4, 2, 2]}


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_basis_turned_in_its_span_keeps_the_lifted_first_moment(shape):
    """Gradients of one span: then Q_new = Q_old O, and the lifted moment is Adam's of the unprojected gradient."""
    rows = positive_qr(gaussian(8, 3))
    dense = DenseAdaRankGrad(zeros(*shape), residual_tol=0.0, update_proj_gap=1, second_moment="squared")
    first, energy, bases = zeros(12, 8), 0.0, []
    for step in range(4):
        H = gaussian(12, 3, seed=10 + step) @ rows.T
        dense.step(H if dense.right else H.T)
        bases.append(dense.basis)
        first, energy = 0.9 * first + 0.1 * H, 0.999 * energy + 0.001 * H.square().sum()
        assert close(dense.adam.M @ dense.basis.T, first)
        assert close(dense.adam.V.sum(), energy)  # squares of an orthogonal matrix have rows and columns of sum one
    assert (bases[1].T @ bases[0] - torch.eye(3, dtype=torch.float64)).norm() > 0.1


def test_basis_is_continuous_where_singular_vectors_are_not():
    """Equal singular values: a perturbation of 1e-8 turns the vectors at will, but not the basis."""
    bases, vectors = [], []
    for seed in (5, 6):
        gradient = matrix_with([1.0, 1.0, 1.0]) + 1e-8 * gaussian(12, 8, seed=seed)
        dense = DenseAdaRankGrad(zeros(12, 8), rank_max=5, residual_tol=1e-3)
        dense.step(gradient)
        bases.append(dense.basis)
        vectors.append(torch.linalg.svd(gradient).Vh[:3].T)
    assert close(*bases, 1e-6)
    assert not close(*vectors, 0.1)


CARRIED = {
    "abs": lambda V, C: (V @ C).abs(),
    "clamp": lambda V, C: torch.where(V @ C > 0, V @ C, 0.0),
    "squared": lambda V, C: torch.einsum("ij,jk,jk->ik", V, C, C),
}


@pytest.mark.parametrize("rule", CARRIED)
def test_second_moment_is_carried_by_its_rule(rule):
    dense = DenseAdaRankGrad(zeros(12, 8), update_proj_gap=1, second_moment=rule)
    dense.step(gaussian(12, 8, seed=0))
    old, V = dense.basis, dense.adam.V
    gradient = gaussian(12, 8, seed=1)
    dense.step(gradient)
    C = old.T @ dense.basis
    assert (V @ C).min() < 0, "the rules do not differ: the test tests nothing"
    assert close(dense.adam.V, 0.999 * CARRIED[rule](V, C) + 0.001 * (gradient @ dense.basis) ** 2)


def test_subspace_lasts_until_its_gradient_is_a_share_of_its_first():
    """A larger gradient in between does not move the threshold; a new subspace has one of its own."""
    dense = DenseAdaRankGrad(zeros(12, 8), update_proj_gap=9, grad_norm_ratio_tol=0.25)
    found = []
    for factor in (1.0, 8.0, 0.3, 0.2, 0.1, 0.03, 0.02):
        dense.step(factor * gaussian(12, 8))
        found.append((dense.refreshes, dense.converged))
    assert found == [(1, False), (1, False), (1, False), (1, True), (2, False), (2, False), (2, True)]


def test_subspace_lasts_until_its_gradient_is_small_or_it_is_old():
    dense = DenseAdaRankGrad(zeros(12, 8), update_proj_gap=3, grad_norm_tol=1e-4, grad_norm_ratio_tol=0.0)
    found = []
    for factor in (1.0, 1.0, 1.0, 1.0, 1e-5, 1.0, 0.0, 0.0, 1.0):
        dense.step(factor * gaussian(12, 8))
        found.append((dense.refreshes, dense.age, dense.converged))
    assert found == [
        (1, 1, False),
        (1, 2, False),
        (1, 3, False),
        (2, 1, False),  # three steps old
        (2, 2, True),
        (3, 1, False),  # the last gradient was small
        (3, 2, True),
        (3, 3, True),  # due, but a zero gradient has no subspace
        (4, 1, False),
    ]
