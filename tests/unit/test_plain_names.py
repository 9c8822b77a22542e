"""Wrappers around a model, or around a layer of it, change neither seeds nor keys nor what a pattern matches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ds_lowrank
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.placement.parameter_names import tag_names
from tests.contract.cases import assert_equal, run, small_model
from tests.engines.pool import run_ranks
from tests.methods import of

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def compiled(module):
    return torch.compile(module, backend="eager")


def with_first(wrap):
    """Wrap one layer only."""

    def around(model):
        model[0] = wrap(model[0])
        return model

    return around


class Forward(nn.Module):
    """As Lightning wraps a module."""

    def __init__(self, module):
        super().__init__()
        self._forward_module = module

    def forward(self, x):
        return self._forward_module(x)


WRAPPERS = {
    "compile": compiled,
    "compiled layer": with_first(compiled),
    "DataParallel": nn.DataParallel,
    "checkpointed": checkpoint_wrapper,
    "checkpointed layer": with_first(checkpoint_wrapper),
    "Lightning": Forward,
    "several": lambda model: compiled(nn.DataParallel(with_first(lambda m: checkpoint_wrapper(compiled(m)))(model))),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GaLore", "VLoRP"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_takes_the_same_steps_and_its_state_is_that_of_the_plain_one(method, wrapper):
    plain, wrapped = small_model(), WRAPPERS[wrapper](small_model())
    first, second = (OPTIMIZERS[method](model, **{"lr": 1e-2, **of(method).small}) for model in (plain, wrapped))
    run(first, plain, range(2))
    run(second, wrapped, range(2))
    assert_equal(plain.parameters(), wrapped.parameters())
    assert list(second.state_dict()["state"]) == NAMES
    continued = small_model()
    continued.load_state_dict(plain.state_dict())
    third = OPTIMIZERS[method](continued, **{"lr": 1e-2, **of(method).small})
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    run(third, continued, range(2, 4))
    run(first, plain, range(2, 4))
    assert_equal(plain.parameters(), continued.parameters())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_patterns_are_those_of_the_plain_model(wrapper):
    optimizer = ds_lowrank.GaLore(WRAPPERS[wrapper](small_model()), rank=2, target_modules=["0.*"])
    assert [slot.tag.name for slot in optimizer.slots if slot.is_projected] == ["0.weight"]


def names_of_engines():
    import deepspeed

    plain = nn.parallel.DistributedDataParallel(small_model())
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    engine, *_ = deepspeed.initialize(model=small_model(), config=config)
    return [list(tag_names(model).values()) for model in (plain, engine)]


def test_names_in_ddp_and_in_an_engine():
    assert run_ranks(1, names_of_engines) == [[NAMES, NAMES]]


def steps_under_ddp():
    plain, wrapped = small_model(), nn.parallel.DistributedDataParallel(small_model())
    optimizers = [ds_lowrank.GaLore(model, lr=1e-2, rank=2) for model in (plain, wrapped)]
    for optimizer, model in zip(optimizers, (plain, wrapped), strict=True):
        run(optimizer, model, range(3))
    assert_equal(plain.parameters(), wrapped.parameters())
    return [list(optimizer.state_dict()["state"]) for optimizer in optimizers]


def test_a_model_in_ddp_takes_the_same_steps():
    assert run_ranks(1, steps_under_ddp) == [[NAMES, NAMES]]


@pytest.mark.slow
def test_peft_around_a_model_and_injected_into_it_give_the_same_names():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    injected, around = peft.inject_adapter_in_model(config, small_model()), peft.get_peft_model(small_model(), config)
    assert set(tag_names(around).values()) == set(tag_names(injected).values())
    assert "0.lora_A.default.weight" in tag_names(around).values()


def test_a_module_of_that_name_in_ones_own_model_keeps_it():
    model = nn.ModuleDict({"module": nn.Linear(3, 4), "base_model": nn.ModuleDict({"model": nn.Linear(3, 4)})})
    names = tag_names(model)
    assert list(names) == list(names.values())
    assert list(tag_names(nn.DataParallel(model)).values()) == list(names)


def test_two_parameters_of_one_name_are_refused():
    model = nn.Linear(3, 4)
    model._orig_mod = nn.Linear(3, 4)
    message = r"weight and _orig_mod\.weight are both weight without the wrappers around them.*another name"
    with pytest.raises(ds_lowrank.ConfigError, match=message):
        ds_lowrank.tag_parameters(model)
