"""Dense FRUGAL, against what analysis knows of it."""

from __future__ import annotations

import pytest

from ds_lowrank.reference.frugal import DenseFrugal
from ds_lowrank.reference.galore import DenseGaLore
from tests.unit.references.common import NEGLIGIBLE, SIDES, close, gaussian, zeros

SHAPES = pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)


@SHAPES
def test_without_the_state_free_part_it_is_galore(shape):
    weights = zeros(*shape), zeros(*shape)
    both = [
        DenseFrugal(weights[0], rank=3, scale=0.25, update_proj_gap=2, moments="keep", state_free_lr_scale=0.0),
        DenseGaLore(weights[1], rank=3, scale=0.25, update_proj_gap=2),
    ]
    for step in range(5):
        for dense in both:
            dense.step(gaussian(*shape, seed=step))
    assert close(*weights)


@SHAPES
def test_with_gradient_descent_in_both_parts_it_is_gradient_descent(shape):
    weight, expected = zeros(*shape), zeros(*shape)
    dense = DenseFrugal(weight, lr=0.1, rank=3, inner="sgd", state_free="sgd", projector="random", update_proj_gap=2)
    for step in range(5):
        dense.step(gaussian(*shape, seed=step))
        expected -= 0.1 * gaussian(*shape, seed=step)
    assert close(weight, expected)


@SHAPES
def test_moments_start_again_in_a_new_subspace(shape):
    """So Adam's step is again one of signs: with columns for a subspace, all elements move by the rate."""
    weight = zeros(*shape)
    dense = DenseFrugal(weight, lr=0.1, rank=3, projector="columns", update_proj_gap=2, eps=NEGLIGIBLE)
    for step in range(5):
        before, gradient = weight.clone(), gaussian(*shape, seed=step)
        dense.step(gradient)
        if step % 2 == 0:
            assert close(before - weight, 0.1 * gradient.sign())
