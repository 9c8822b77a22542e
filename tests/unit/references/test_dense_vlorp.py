"""Dense VLoRP, against what analysis knows of it."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.galore import DenseAdamW
from ds_lowrank.reference.vlorp import DenseVLoRP
from tests.unit.references.common import NEGLIGIBLE, SIDES, close, gaussian, zeros

VIEWS = {
    "right": ((8, 12), {"proj_type": "right"}),
    "left": ((12, 8), {"proj_type": "left"}),
    "official left": ((12, 8), {"proj_type": "left", "left_view": "official"}),
}


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("granularity", ["1/2", 1, 3])
@pytest.mark.parametrize("view", VIEWS)
def test_projecting_and_lifting_is_unbiased_with_the_known_variance(view, granularity, distribution):
    """E[P P^T] = I; E||.||^2 is 1 + (L+1)/r times ||G||^2 for normal entries, 1 + (L-1)/r for signs (E p^4 = 1/r^2).

    Seeds are independent draws, so a mean over them has the standard error of the sample; five of those leave out one
    normal variable in two million, and there are 97 here.
    """
    shape, options = VIEWS[view]
    gradient, draws, rank = gaussian(*shape), 1500, 2
    dense = DenseVLoRP(zeros(*shape), granularity=granularity, distribution=distribution, rank=rank, **options)
    estimates = []
    for counter in range(draws):
        P = dense.projection(counter)
        estimates.append(dense.unview(dense.view(gradient) @ P @ P.T))
    estimates = torch.stack(estimates)
    energies = estimates.square().sum((1, 2))
    spread = {"gaussian": dense.length + 1, "rademacher": dense.length - 1}[distribution]
    assert dense.length == 12 / dense.c
    assert ((estimates.mean(0) - gradient).abs() <= 5 * estimates.std(0) / draws**0.5).all()
    expected = (1 + spread / rank) * gradient.square().sum()
    assert (energies.mean() - expected).abs() <= 5 * energies.std() / draws**0.5


def test_unit_is_a_piece_of_a_row_or_column_or_every_cth_row():
    gradient = torch.arange(32.0).view(8, 4)
    right = DenseVLoRP(torch.zeros(8, 4), granularity=2)
    left = DenseVLoRP(torch.zeros(8, 4), granularity=2, proj_type="left")
    official = DenseVLoRP(torch.zeros(8, 4), granularity=2, proj_type="left", left_view="official")
    assert right.view(gradient)[1].tolist() == [2.0, 3.0]
    assert left.view(gradient)[1].tolist() == [16.0, 20.0, 24.0, 28.0]
    assert official.view(gradient)[1].tolist() == [1.0, 9.0, 17.0, 25.0]
    for dense in (right, left, official):
        assert torch.equal(dense.unview(dense.view(gradient)), gradient)


@pytest.mark.parametrize("view", VIEWS)
def test_projected_micro_batches_add_up(view):
    shape, options = VIEWS[view]
    dense = DenseVLoRP(zeros(*shape), granularity=3, **options)
    P = dense.projection(0)
    batches = [gaussian(*shape, seed=seed) for seed in range(4)]
    assert close(sum(dense.view(batch) @ P for batch in batches), dense.view(sum(batches)) @ P)


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_subspace_scheme_with_whole_rows_is_adam_on_a_projection(shape):
    weight, projected = zeros(*shape), zeros(12, 3)
    dense = DenseVLoRP(weight, rank=3, granularity=1, update_scheme="subspace")
    adam, P = DenseAdamW(projected, eps=1e-6), dense.projection(0)
    for step in range(5):
        gradient = gaussian(*shape, seed=step)
        dense.step(gradient)
        adam.step((gradient if dense.right else gradient.T) @ P)
    assert close(weight if dense.right else weight.T, projected @ P.T)


@pytest.mark.parametrize("bias_correction", ["sqrt", "linear"])
@pytest.mark.parametrize("eps_position", ["outside", "inside"])
@pytest.mark.parametrize("view", VIEWS)
def test_projfactor_ignores_a_factor_on_the_projection(view, eps_position, bias_correction):
    class Sevenfold(DenseVLoRP):
        def projection(self, counter):
            return 7 * super().projection(counter)

    shape, options = VIEWS[view]
    options = {**options, "eps_position": eps_position, "bias_correction": bias_correction, "eps": NEGLIGIBLE}
    weights = [zeros(*shape), zeros(*shape)]
    rules = [kind(w, granularity=3, **options) for kind, w in zip((DenseVLoRP, Sevenfold), weights, strict=True)]
    for step in range(4):
        for rule in rules:
            rule.step(gaussian(*shape, seed=step))
    assert close(*weights)


def test_projfactor_is_adam_on_squares_of_one_outer_product():
    """There its factors are the second moment. c = n makes every element a unit, P a number that cancels."""
    gradient = torch.outer(gaussian(8).abs() + 0.1, gaussian(6, seed=1))
    weights = [zeros(8, 6), zeros(8, 6)]
    for weight, scheme in zip(weights, ("projfactor", "original_space"), strict=True):
        dense = DenseVLoRP(weight, rank=1, granularity=6, update_scheme=scheme, eps=NEGLIGIBLE)
        for factor in (1.0, -3.0, 0.5):
            dense.step(factor * gradient)
    assert close(*weights)


@pytest.mark.parametrize("scheme", ["projfactor", "subspace"])
def test_reset_moment_starts_again(scheme):
    """Both moments of the subspace scheme restart: after a reset it is a new optimizer, except for the projection."""
    dense = DenseVLoRP(zeros(12, 8), granularity=2, update_proj_gap=2, update_scheme=scheme, moment_on_resample="reset")
    for step in range(3):
        before = dense.weight.clone()
        gradient = gaussian(12, 8, seed=step)
        dense.step(gradient)
    P = dense.projection(1)
    R = dense.view(gradient) @ P
    moved = before - dense.weight
    if scheme == "subspace":
        assert close(moved, 1e-2 * dense.unview((R / (R.abs() + 1e-6)) @ P.T))
    else:
        vhat = torch.outer(dense.v_row, dense.v_col) / dense.v_row.sum() / (1 - 0.999**3)
        # eps is added to the uncorrected root: 1e-6 to values above 1e-2.
        assert close(moved, 1e-2 * dense.unview(R @ P.T) / vhat.sqrt(), 1e-4)


def test_reprojected_moment_is_the_old_one_in_the_new_projection():
    dense = DenseVLoRP(zeros(12, 8), granularity=2, update_proj_gap=1, moment_on_resample="reproject")
    first, second = gaussian(12, 8, seed=0), gaussian(12, 8, seed=1)
    dense.step(first)
    dense.step(second)
    old, new = dense.projection(0), dense.projection(1)
    lifted = dense.view(first) @ old @ old.T / (1 + (dense.length + 1) / dense.rank) ** 0.5
    assert close(dense.M, (0.9 * 0.1 * lifted + 0.1 * dense.view(second)) @ new)
