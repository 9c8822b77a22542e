"""``master_weights`` without an engine: what is refused, what is warned about, and what it does."""

from __future__ import annotations

import logging

import pytest
import torch

import ds_lowrank
from ds_lowrank.errors import ConfigError


def model_in(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Linear(32, 16)).to(dtype)


def step(model, optimizer, size=1.0):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, size)
    optimizer.step()


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.float16, "float16")])
def test_weights_that_are_not_in_bf16_are_refused(dtype, name):
    model = model_in(dtype)
    optimizer = ds_lowrank.GaLore(model, rank=4, master_weights=False)
    with pytest.raises(ConfigError, match=f"^master_weights is false, but the weights are in {name}: convert the mod"):
        step(model, optimizer)


def test_groups_that_differ_are_refused():
    model = model_in(torch.bfloat16)
    ds_lowrank.tag_parameters(model)
    groups = [{"params": list(layer.parameters()), "master_weights": i == 0} for i, layer in enumerate(model)]
    with pytest.raises(ConfigError, match="true in some parameter groups and false in others"):
        step(model, ds_lowrank.GaLore(groups, rank=4))


@pytest.mark.parametrize("value", [1, "false", None])
def test_only_true_and_false_are_taken(value):
    with pytest.raises(ConfigError, match=r"params\.master_weights \(GaLore\): Input should be a valid bool"):
        ds_lowrank.GaLore(model_in(torch.bfloat16), rank=4, master_weights=value)


def test_rounding_to_the_nearest_is_warned_about_once(caplog):
    model = model_in(torch.bfloat16)
    optimizer = ds_lowrank.GaLore(model, rank=4)
    with caplog.at_level(logging.WARNING, "ds_lowrank"):
        step(model, optimizer)
        step(model, optimizer)
    assert caplog.text.count("set master_weights to false, which rounds stochastically") == 1


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_updates_too_small_for_bf16_add_up(state_dtype, caplog):
    """Adam moves what is not projected by lr in each step, a twelfth of the distance to the next number."""
    steps, lr, moved = 200, 1e-5, {}
    for keeps in (True, False):
        model = model_in(torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.03)  # the next number is 1.2e-4 away
        options = {"lr": lr, "exclude_modules": ["1.*"], "state_dtype": state_dtype, "master_weights": keeps}
        optimizer = ds_lowrank.GaLore(model, rank=4, **options)
        with caplog.at_level(logging.WARNING, "ds_lowrank"):
            for _ in range(steps):
                step(model, optimizer)
        moved[keeps] = torch.cat([0.03 - p.detach().double().flatten() for p in list(model.parameters())[1:]])
    start = 0.03 - float(torch.tensor(0.03, dtype=torch.bfloat16))
    assert (moved[True] == start).all(), "rounded to the nearest, nothing moves"
    # A step moves an element by an ulp with the probability lr / ulp, independently of all others.
    ulp, count = 2.0**-13, moved[False].numel()
    error = ulp * (steps * (lr / ulp) * (1 - lr / ulp) / count) ** 0.5
    assert abs(moved[False].mean().item() - start - steps * lr) < 3 * error + 1e-3 * steps * lr
