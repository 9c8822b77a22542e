"""Weights in bf16 without fp32 copies: a step rounds them alike however a matrix is cut."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.methods import METHODS
from tests.methods import of
from tests.simulated.harness import ShardedMatrix, even_parts, flat_parts, tensor_parallel_parts

SHAPE = 40, 24
CUTS = {
    "three ranks": even_parts(SHAPE, 3),
    "rows over tensor ranks": tensor_parallel_parts(SHAPE, "rows"),
    "columns over tensor ranks": tensor_parallel_parts(SHAPE, "columns"),
}
STEPS = 3


def train(method, parts, **options):
    """Some steps on bf16 gradients of ones that have unit size, from weights of unit size."""
    torch.manual_seed(0)
    start = torch.randn(SHAPE).bfloat16()
    options = {**of(method).cases[0], "lr": 1e-2, "eps": 0.1, "master_weights": False, **options}
    matrix = ShardedMatrix(method, start.clone(), parts, **options)
    gradients = of(method).gradients_for(SHAPE)
    for step in range(STEPS):
        matrix.step(gradients(step).bfloat16())
    return start, matrix.weight


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", CUTS)
def test_every_layout_rounds_alike(method, cut):
    """Sums in another order differ by 1e-6 of an update of some units in the last place.

    So about one of 10^5 roundings may decide otherwise; two of 960 are allowed.
    """
    start, whole = train(method, flat_parts(SHAPE, []))
    _, found = train(method, CUTS[cut])
    assert whole.dtype == found.dtype == torch.bfloat16
    assert (whole != start).double().mean() > 0.2, "little moves: the test tests little"
    assert (found != whole).sum() <= 2


@pytest.mark.parametrize("method", METHODS)
def test_fp32_weights_are_written_as_ever(method):
    found = []
    for keeps in (True, False):
        torch.manual_seed(0)
        start, gradients = torch.randn(SHAPE), of(method).gradients_for(SHAPE)
        options = {**of(method).cases[0], "lr": 1e-2, "master_weights": keeps}
        matrix = ShardedMatrix(method, start, even_parts(SHAPE, 2), **options)
        for step in range(STEPS):
            matrix.step(gradients(step))
        found.append(matrix.weight)
    assert torch.equal(*found)
