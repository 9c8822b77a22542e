"""Dense GaLore and the inner optimizers, against closed forms and torch."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.galore import DenseGaLore
from ds_lowrank.reference.inner import Adafactor
from tests.unit.references.common import SIDES, close, gaussian, zeros


@pytest.mark.parametrize("moments", ["keep", "rotate"])
@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_full_rank_with_momentum_is_plain_momentum(shape, moments):
    """A complete orthonormal basis only changes coordinates; momentum is linear. Kept moments need the old basis."""
    gap = 2 if moments == "rotate" else 100
    plain = torch.nn.Parameter(gaussian(*shape, seed=3))
    weight = plain.detach().clone()
    oracle = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    options = {"inner": "sgd", "momentum": 0.9, "moments": moments}
    dense = DenseGaLore(weight, rank=8, scale=1.0, lr=0.1, update_proj_gap=gap, **options)
    for step in range(6):
        plain.grad = gaussian(*shape, seed=10 + step)
        oracle.step()
        dense.step(plain.grad)
    assert close(weight, plain.detach())


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_full_rank_with_the_original_lion_is_lion(shape):
    weight, plain, m = gaussian(*shape, seed=3), gaussian(*shape, seed=3), zeros(*shape)
    dense = DenseGaLore(weight, rank=8, scale=1.0, lr=0.1, inner="lion", lion_sign="original", betas=(0.9, 0.99))
    for step in range(4):
        gradient = gaussian(*shape, seed=10 + step)
        plain -= 0.1 * torch.sign(0.9 * m + 0.1 * gradient)
        m = 0.99 * m + 0.01 * gradient
        dense.step(gradient)
    assert close(weight, plain)


def test_lion_in_the_subspace_steps_along_signs_of_its_coordinates():
    weight = zeros(12, 8)
    dense = DenseGaLore(weight, scale=0.5, lr=0.1, inner="lion")
    gradient = gaussian(12, 8)
    dense.step(gradient)
    assert close(weight @ dense.basis, -0.05 * torch.sign(gradient @ dense.basis))


def test_adafactor_matches_torch():
    """torch's rate is ``max(eps[1], rms(weight)) * min(lr, 1/sqrt(t))``: lr, from zero weights with eps[1] = 1."""
    plain = torch.nn.Parameter(zeros(12, 4))
    weight = zeros(12, 4)
    oracle = torch.optim.Adafactor([plain], lr=1e-3, eps=(1e-15, 1.0), weight_decay=0.0)
    rule = Adafactor()
    for step, factor in enumerate((1.0, 0.1, 10.0, 0.01, 1.0)):  # only some of the steps are clipped
        plain.grad = factor * gaussian(12, 4, seed=step)
        oracle.step()
        weight -= 1e-3 * rule.direction(plain.grad)
    assert close(weight, plain.detach())
