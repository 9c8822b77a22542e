"""A layer that is frozen when the optimizer is built and trained later: from then on it steps like any other."""

from __future__ import annotations

import pytest
import torch

import ds_lowrank
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.contract.cases import EVERY, assert_equal, build, copy_of, run, small_model, take_gradients
from tests.methods import of


def frozen_model():
    model = small_model()
    model[0].requires_grad_(False)
    return model


@EVERY
@pytest.mark.parametrize("after", [0, 2])
def test_an_unfrozen_layer_is_trained_from_then_on(name, after):
    """As by an optimizer that has had the layer from the start, and finds no gradient of it in the first steps."""
    model, twin = frozen_model(), small_model()
    optimizer, expected = build(name, model), build(name, twin)
    before = [p.detach().clone() for p in model[0].parameters()]
    for step in range(5):
        if step == after:
            model[0].requires_grad_(True)
        take_gradients(model, step)
        take_gradients(twin, step)
        if step < after:
            twin[0].zero_grad()
        optimizer.step()
        expected.step()
        assert_equal(model.parameters(), twin.parameters())
    assert not any(torch.equal(p, old) for p, old in zip(model[0].parameters(), before, strict=True))
    saved = optimizer.state_dict()
    assert saved["layout"] == expected.state_dict()["layout"]
    again = small_model()
    again.load_state_dict(model.state_dict())
    again[0].requires_grad_(False)
    resumed = build(name, again)
    with pytest.raises(ds_lowrank.CheckpointError, match=r"0\.bias is frozen, .* \(2 .* unfreeze them before loading"):
        resumed.load_state_dict(saved)
    again[0].requires_grad_(True)
    resumed.load_state_dict(saved)
    run(optimizer, model, range(5, 7))
    run(resumed, again, range(5, 7))
    assert_equal(model.parameters(), again.parameters())


@EVERY
def test_a_group_that_was_frozen_as_a_whole_keeps_its_place_and_options(name):
    model = frozen_model()
    ds_lowrank.tag_parameters(model)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
    optimizer = OPTIMIZERS[name](groups, **of(name).small)
    run(optimizer, model, range(1))
    before = copy_of(model[0])
    model[0].requires_grad_(True)
    run(optimizer, model, range(1, 2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]
    assert [slot.tag.name for slot in optimizer.slots] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    moved, by = ((a - b).abs().max().item() for a, b in zip(model[0].parameters(), before, strict=True))
    assert moved > 0
    assert by == pytest.approx(0.5, rel=1e-3)  # AdamW's first step on a bias is its learning rate


@EVERY
def test_everything_projected_may_be_frozen_at_first_with_a_warning(name, caplog):
    model = small_model()
    for part in (model[0], model[2]):
        part.weight.requires_grad_(False)
    optimizer = build(name, model)
    with caplog.at_level("WARNING", logger="ds_lowrank"):
        run(optimizer, model, range(1))
    (warning,) = caplog.records
    assert f"{name} has nothing to project" in warning.getMessage()
    assert "unfreeze some of the 2 frozen matrices" in warning.getMessage()
    model.requires_grad_(True)
    run(optimizer, model, range(1, 2))
    assert optimizer.metrics()["lowrank/projected_matrices"] == 2


@EVERY
def test_a_late_parameter_that_does_not_fit_is_refused(name):
    model = small_model()
    late = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float64), requires_grad=False)
    model.register_parameter("late", late)
    optimizer = build(name, model)
    run(optimizer, model, range(1))
    late.requires_grad_(True)
    with pytest.raises(ds_lowrank.ConfigError, match=r"late is torch\.float64"):
        optimizer.step()


def test_lorenza_moves_an_unfrozen_layer_too():
    """As one that knew the layer from the start: neither moves it before it has a subspace."""
    model, twin = frozen_model(), small_model()
    optimizers = [ds_lowrank.Lorenza(m, lr=1e-2, rank=3, update_proj_gap=2) for m in (model, twin)]
    inputs = torch.randn(32, 12)
    for step in range(5):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            each[0].requires_grad_(step > 0)
            optimizer.zero_grad()
            ds_lowrank.forward_backward(optimizer, lambda each=each: each(inputs).square().mean())
            optimizer.step()
        assert_equal(model.parameters(), twin.parameters())
    assert optimizers[0].metrics() == optimizers[1].metrics()
    assert optimizers[0].metrics()["lowrank/projected_matrices"] == 2
