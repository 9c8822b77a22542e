"""What an optimizer refuses, before anything changes, and what it says."""

from __future__ import annotations

import copy

import pytest
import torch

import ds_lowrank
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.contract.cases import EVERY, build, build_single, run, small_model
from tests.methods import of


@EVERY
def test_nameless_parameters_are_refused_and_tags_are_enough(name):
    model = small_model()
    with pytest.raises(ds_lowrank.ConfigError, match="named_parameters"):
        OPTIMIZERS[name](model.parameters())
    ds_lowrank.tag_parameters(model)
    assert len(OPTIMIZERS[name](model.parameters(), **of(name).small).slots) == 4


@EVERY
def test_name_or_parameter_given_twice_is_refused(name):
    first, second = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    with pytest.raises(ds_lowrank.ConfigError, match="weight: given twice"):
        OPTIMIZERS[name]([*first.named_parameters(), *second.named_parameters()])
    with pytest.raises(ds_lowrank.ConfigError, match="a: given twice"):
        OPTIMIZERS[name]([("a", first.weight), ("a", first.weight)])


@EVERY
def test_noncontiguous_weight_is_refused(name):
    with pytest.raises(ds_lowrank.ConfigError, match="not contiguous"):
        build_single(name, torch.nn.Parameter(torch.randn(4, 6).T)).bind()


@EVERY
def test_float64_weight_is_refused(name):
    with pytest.raises(ds_lowrank.ConfigError, match="float64; the arithmetic is fp32"):
        OPTIMIZERS[name]([("w", torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)))])


@EVERY
def test_sparse_gradient_is_refused(name):
    table = torch.nn.Embedding(5, 4, sparse=True)
    before = table.weight.detach().clone()
    optimizer = OPTIMIZERS[name](table.named_parameters(), **of(name).small)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(table.weight, before)


@EVERY
def test_copy_of_an_optimizer_is_refused(name):
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(build(name, small_model()))


@EVERY
def test_step_on_replaced_parameters_is_refused(name):
    model = small_model()
    optimizer = build(name, model)
    run(optimizer, model, range(1))
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(20, 12))
    with pytest.raises(RuntimeError, match="not built with"):
        optimizer.step()
