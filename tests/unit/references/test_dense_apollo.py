"""Dense APOLLO and APOLLO-Mini, against what analysis knows of them."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.apollo import DenseApollo
from tests.unit.references.common import NEGLIGIBLE, SIDES, close, gaussian, zeros


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_first_step_ignores_a_factor_on_the_gradient(shape, mini):
    weights = [zeros(*shape), zeros(*shape)]
    for factor, weight in zip((1.0, 1e-3), weights, strict=True):
        DenseApollo(weight, rank=3, mini=mini, eps=NEGLIGIBLE).step(factor * gaussian(*shape))
    assert close(*weights)


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_step_only_scales_channels_of_the_gradient(shape):
    """Adam's first direction is of signs: a channel's scale is √r over the norm of its projection."""
    weight, gradient = zeros(*shape), gaussian(*shape)
    dense = DenseApollo(weight, rank=3, lr=1.0, eps=NEGLIGIBLE)
    dense.step(gradient)
    W, H = (weight, gradient) if dense.right else (weight.T, gradient.T)
    channel = (W * H).sum(1, keepdim=True) / H.square().sum(1, keepdim=True)
    assert (channel < 0).all()
    assert close(channel * H, W)
    assert channel.std() > 0.1  # not one scale for all


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_step_of_mini_is_parallel_to_the_gradient(shape):
    weight = zeros(*shape)
    dense = DenseApollo(weight, mini=True, lr=1.0, norm_growth_limit=None)
    for step in range(3):
        gradient, before = gaussian(*shape, seed=step), weight.clone()
        dense.step(gradient)
        moved = before - weight
        assert close(moved, moved.norm() * gradient / gradient.norm())
    assert (dense.rank, dense.scale) == (1, 128**0.5)


def test_limiter_bounds_the_growth_of_the_step():
    def sizes(limit):
        weight = zeros(12, 8)
        dense, norms = DenseApollo(weight, rank=3, lr=1.0, norm_growth_limit=limit), []
        for step in range(8):
            before = weight.clone()
            dense.step((-1.0) ** min(step, 2) * gaussian(12, 8))  # one turn back, after which the steps pick up again
            norms.append((weight - before).norm())
        return torch.stack(norms)

    free, bounded = sizes(None), sizes(1.01)
    growth = bounded[1:] / bounded[:-1]
    assert (free[1:] / free[:-1]).max() > 5
    assert growth.max().item() == pytest.approx(1.01, rel=1e-9)
    assert close(bounded[0], free[0])
