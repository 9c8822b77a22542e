"""Gradients of zeros, NaN, rank one, and of sizes whose squares leave the range of fp32."""

from __future__ import annotations

import copy

import pytest
import torch

from ds_lowrank.methods import METHODS
from tests.contract.cases import (
    EVERY,
    assert_equal,
    build,
    build_single,
    copy_of,
    having,
    run,
    small_model,
    take_gradients,
)
from tests.methods import of, taken


def set_gradients_to_zero(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


@EVERY
def test_zero_gradient_before_the_first_is_no_step(name):
    model, twin = small_model(), small_model()
    optimizer, other = build(name, model, weight_decay=0.1), build(name, twin, weight_decay=0.1)
    set_gradients_to_zero(model)
    optimizer.step()
    assert_equal(model.parameters(), twin.parameters())
    run(optimizer, model, range(3))
    run(other, twin, range(3))
    assert_equal(model.parameters(), twin.parameters())


STORES_BASIS = [n for n in sorted(METHODS) if "basis" in build(n, small_model()).state_dict()["state"]["0.weight"]]


@pytest.mark.parametrize("name", STORES_BASIS)
def test_zero_gradient_at_refresh_keeps_the_basis(name):
    """The momentum goes on in it, as in a step at which no refresh is due."""
    model = small_model()
    optimizer = build(name, model)
    run(optimizer, model, range(3))
    basis, twin = optimizer.state_dict()["state"]["0.weight"]["basis"].clone(), copy.deepcopy(model)
    undue = build(name, twin, **taken(name, {"update_proj_gap": 100}))
    undue.load_state_dict({**optimizer.state_dict(), "param_groups": undue.state_dict()["param_groups"]})
    for slot in undue.slots:
        slot.state.update({"used_up": 0} if "used_up" in slot.state else {})
    for one, of_one in ((optimizer, model), (undue, twin)):
        set_gradients_to_zero(of_one)
        one.step()
    assert torch.equal(optimizer.state_dict()["state"]["0.weight"]["basis"], basis)
    assert_equal(model.parameters(), twin.parameters())


@EVERY
def test_nan_gradient_changes_nothing_and_is_counted(name):
    model = small_model()
    optimizer = build(name, model)
    run(optimizer, model, range(2))
    before, refreshes = copy_of(model), optimizer.metrics()["lowrank/refreshes"]
    take_gradients(model, 2)
    model[2].bias.grad[1] = float("inf")
    optimizer.step()
    assert_equal(model.parameters(), before)
    metrics = optimizer.metrics()
    assert (metrics["lowrank/projected_matrices"], metrics["lowrank/adamw_parameters"]) == (0, 0)
    assert (metrics["lowrank/skipped_updates"], metrics["lowrank/refreshes"]) == (1, refreshes)
    assert [slot.state["step"] for slot in optimizer.slots] == [2] * 4


@having("follows_gradient_rows")
def test_rank_deficient_gradient_is_updated_in_its_own_subspace(name):
    """A gradient of rank 1 at rank 3: directions without signal are left out, not filled with noise."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 9))
    row = torch.randn(9)
    optimizer = build_single(name, weight)
    before = weight.detach().clone()
    weight.grad = torch.outer(torch.randn(12), row)
    optimizer.step()
    update = weight.detach() - before
    across = update - torch.outer(update @ row, row) / row.square().sum()
    assert update.norm() > 0.01
    assert across.norm() < 1e-5 * update.norm()


@having("first_step_ignores_size")
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_first_step_ignores_the_size_of_the_gradient(name, scale):
    """Adam's first step is a direction alone, so a common factor must not change it.

    Beyond these scales the squares leave fp32 in Adam's own second moment, in any Adam.
    """
    steps = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(12, 9))
        optimizer = build_single(name, weight, eps=1e-30)
        weight.grad = torch.randn(12, 9) * factor
        optimizer.step()
        steps.append(weight.detach())
    assert torch.allclose(*steps, rtol=0, atol=1e-5)


@EVERY
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-25])
def test_gradient_whose_squares_underflow_leaves_all_finite(name, scale):
    """As the first one, when sums of squares would be divided by each other, and in between."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(12, 9))
    optimizer = build_single(name, weight)
    for factor in (scale, 1.0, scale, 1.0):
        weight.grad = torch.randn(12, 9) * factor
        optimizer.step()
    assert weight.isfinite().all()
    assert all(v.isfinite().all() for v in optimizer.slots[0].state.values() if torch.is_tensor(v))
    assert (optimizer.skipped_updates, optimizer.slots[0].state["step"]) == (0, 4)


@EVERY
@pytest.mark.parametrize("scale", [1e17, 1e30])
def test_gradient_whose_squares_overflow_is_skipped_and_counted(name, scale):
    """The steps around it are those that would have been taken without it."""
    torch.manual_seed(0)
    start, gradients, weights = of(name).start((12, 9)), torch.randn(2, 12, 9), []
    for given in ([gradients[0], gradients[1] * scale, gradients[1]], gradients):
        weight = torch.nn.Parameter(start.clone())
        optimizer = build_single(name, weight)
        for gradient in given:
            weight.grad = gradient.clone()
            optimizer.step()
        assert (optimizer.skipped_updates, optimizer.slots[0].state["step"]) == (len(given) - 2, 2)
        weights.append(weight.detach())
    assert torch.equal(*weights)
