"""Dense RACS and SCALE, against what analysis knows of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from ds_lowrank.reference.racs import DenseRacs
from ds_lowrank.reference.scale import DenseScale
from tests.unit.references.common import SIDES, close, gaussian, zeros


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_racs_is_sign_descent_where_squares_have_rank_one(shape):
    """``s q^T`` is then ``H * H`` itself, times what the averages have seen of it: ``1 - beta^t``."""
    m, n = shape
    gradient = torch.outer(gaussian(m, 1)[:, 0], gaussian(1, n, seed=1)[0])
    weight = zeros(m, n)
    dense = DenseRacs(weight, lr=1.0, scale=1.0, norm_growth_limit=None)
    for t in range(1, 4):
        before = weight.clone()
        dense.step(gradient)
        assert close(before - weight, gradient.sign() / (1 - 0.9**t))


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_racs_approaches_the_principal_singular_vectors_of_the_squares(shape):
    gradient = gaussian(*shape)
    s, q = DenseRacs(zeros(*shape), iterations=50).fixed_point(gradient)
    U, sigma, Vh = torch.linalg.svd(gradient**2)
    assert close(torch.outer(s, q), sigma[0] * torch.outer(U[:, 0], Vh[0]))


def test_racs_limiter_bounds_the_growth_of_the_update():
    weight, norms = zeros(9, 7), []
    dense = DenseRacs(weight, lr=1.0, scale=1.0, norm_growth_limit=1.1, beta=0.99)
    for step, factor in enumerate((1e-2, 1.0, 1.0, 10.0)):
        before = weight.clone()
        dense.step(factor * gaussian(9, 7, seed=step))
        norms.append((weight - before).norm().item())
    growths = [after / before for before, after in itertools.pairwise(norms)]
    assert all(growth < 1.1001 for growth in growths) and max(growths) > 1.0999


@pytest.mark.parametrize("normalization", ["rms", "length"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_scale_gives_every_unit_one_length_whatever_its_gradient(side, normalization):
    weight, by_rows = zeros(9, 7), side == "right"
    units = torch.logspace(-3, 3, 9 if by_rows else 7)
    gradient = gaussian(9, 7) * (units[:, None] if by_rows else units)
    DenseScale(weight, lr=1.0, proj_type=side, normalization=normalization, momentum=0.5).step(gradient)
    dim = 1 if by_rows else 0
    expected = weight.shape[dim] ** 0.5 if normalization == "rms" else 1.0
    lengths = weight.norm(dim=dim)
    assert close(lengths, torch.full_like(lengths, expected))
    assert close(-weight / expected, gradient / gradient.norm(dim=dim, keepdim=True))
