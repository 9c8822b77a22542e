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
def test_parameters_without_their_model_are_refused_and_tags_are_enough(name):
    """A name is not enough: ``0.weight`` may be that of an embedding."""
    model = small_model()
    for given in (model.parameters(), model.named_parameters(), [{"params": model.named_parameters()}]):
        with pytest.raises(ds_lowrank.ConfigError, match=r"Pass the model itself, or call ds_lowrank\.tag_parameters"):
            OPTIMIZERS[name](given, **of(name).small)
    with pytest.raises(ds_lowrank.ConfigError, match="params of a group is a module: "):
        OPTIMIZERS[name]([{"params": model}], **of(name).small)
    for change in (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.spectral_norm):
        changed = torch.nn.Sequential(change(torch.nn.Embedding(9, 8)))
        with pytest.raises(ds_lowrank.ConfigError, match=r"Pass the model itself, or call ds_lowrank\.tag_parameters"):
            OPTIMIZERS[name](changed.named_parameters(), **of(name).small)
    ds_lowrank.tag_parameters(model)
    for given in (model.parameters(), model.named_parameters(), model):
        assert len(OPTIMIZERS[name](given, **of(name).small).slots) == 4


@EVERY
def test_a_run_in_which_nothing_is_projected_is_refused(name):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.LayerNorm(8))
    message = f"{name} has nothing to project.*: 1 x embedding \\(0.weight\\); 2 x 1-D \\(1.weight, 1.bias\\)"
    with pytest.raises(ds_lowrank.ConfigError, match=message):
        OPTIMIZERS[name](model, **of(name).small)
    assert OPTIMIZERS[name](model, **of(name).small, target_modules=["0"]).slots[0].is_projected
    model.append(torch.nn.Linear(8, 7))
    ds_lowrank.tag_parameters(model)
    biases = {"params": [p for p in model.parameters() if p.ndim == 1]}  # a group may have none
    optimizer = OPTIMIZERS[name]([biases, {"params": [p for p in model.parameters() if p.ndim == 2]}], **of(name).small)
    assert sum(slot.is_projected for slot in optimizer.slots) == 1


@EVERY
@pytest.mark.parametrize("in_group", [False, True])
def test_a_target_that_matches_only_what_is_never_projected_is_refused(name, in_group):
    model = small_model()
    model.register_parameter("stack", torch.nn.Parameter(torch.ones(2, 3, 4)))
    ds_lowrank.tag_parameters(model)
    for pattern, what in (("stack", r"stack \(3-D\)"), ("*.bias", r"0.bias \(1-D\), 2.bias \(1-D\); 2 in all")):
        chosen = {"target_modules": ["0.weight", pattern]}
        group = {"params": model.parameters(), **(chosen if in_group else {})}
        with pytest.raises(ds_lowrank.ConfigError, match=f"target_modules.*only parameters that are never.*{what}"):
            OPTIMIZERS[name]([group], **of(name).small, **({} if in_group else chosen))
    OPTIMIZERS[name](model, **of(name).small, target_modules=["0", "2.*"], exclude_modules=["stack"]).bind()


@EVERY
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_patterns_that_can_be_read_only_once_are_refused(name, key):
    """They are read more than once, and the second reader would find none."""
    with pytest.raises(ds_lowrank.ConfigError, match=rf"optimizer\.params\.{key} .*: a list, not a generator"):
        OPTIMIZERS[name](small_model(), **of(name).small, **{key: (pattern for pattern in ["0.*"])})


@EVERY
def test_name_or_parameter_given_twice_is_refused(name):
    first, second = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    ds_lowrank.tag_parameters(first)
    ds_lowrank.tag_parameters(second)
    with pytest.raises(ds_lowrank.ConfigError, match="weight: given twice"):
        OPTIMIZERS[name]([*first.named_parameters(), *second.named_parameters()])
    with pytest.raises(ds_lowrank.ConfigError, match="a: given twice"):
        OPTIMIZERS[name]([("a", torch.nn.Parameter(torch.ones(3, 4)))] * 2)


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
    optimizer = OPTIMIZERS[name](torch.nn.ModuleList([table, torch.nn.Linear(4, 4)]), **of(name).small)
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
