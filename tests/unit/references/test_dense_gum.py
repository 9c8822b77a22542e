"""GUM's reference in the limits that say what it is."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.gum import DenseGum, newton_schulz


def added(whole, gradient):
    """What a first step adds to the momentum, in the space of the gradient."""
    method = DenseGum(torch.zeros(9, 6), rank=2, full_share=0.3)
    method.begin_period(gradient, gradient)
    method.begin_period, method.whole = lambda *_: None, whole
    method.step(gradient)
    return method.M if whole else method.M @ method.basis.T


def test_what_is_added_is_the_gradient_on_average():
    torch.manual_seed(0)
    gradient = torch.randn(9, 6)
    mean = 0.3 * added(True, gradient) + 0.7 * added(False, gradient)
    assert torch.allclose(mean.float(), gradient, atol=1e-5)


def test_a_share_of_one_is_muon():
    torch.manual_seed(0)
    weight, momentum, expected = torch.zeros(9, 6), torch.zeros(9, 6), torch.zeros(9, 6)
    method = DenseGum(weight, full_share=1.0, lr=0.1)
    for _ in range(3):
        gradient = torch.randn(9, 6)
        method.step(gradient)
        momentum = 0.95 * momentum + gradient
        expected -= 0.1 * newton_schulz(momentum)
    assert torch.allclose(weight, expected, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_coins_fall_on_whole_as_often_as_the_share_says(share):
    from ds_lowrank.methods.gum import GumOptions

    options = GumOptions(full_share=share)
    count = sum(options.is_whole(f"layers.{i}", period) for i in range(50) for period in range(40))
    assert abs(count / 2000 - share) < 0.03
