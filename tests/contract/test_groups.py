"""Parameter groups: what they may override, in which form they may come, and what about them is refused."""

from __future__ import annotations

import pytest
import torch

import ds_lowrank
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.registry import OPTIMIZERS
from tests.contract.cases import EVERY, build, run, small_model
from tests.methods import of


def parts_of(model):
    """The first parameter, and the rest."""
    ds_lowrank.tag_parameters(model)
    named = list(model.named_parameters())
    return named[:1], named[1:]


@EVERY
def test_groups_override_options(name):
    first, rest = parts_of(small_model())
    keys = METHODS[name].Options.model_fields
    rank_key = next((key for key in ("rank", "rank_max") if key in keys), None)
    override = {rank_key: 2} if rank_key else {}
    groups = [{"params": first, "lr": 0.5, "betas": [0.8, 0.9], **override}, {"params": rest, "name": "rest"}]
    optimizer = OPTIMIZERS[name](groups, **of(name).small)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]
    own = METHODS[name].Options(**of(name).small).betas
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9), own]
    ranks = {slot.tag.name: slot.rank for slot in optimizer.slots if slot.is_projected}
    assert ranks.keys() == {"0.weight", "2.weight"}
    assert ranks == {"0.weight": 2, "2.weight": 3} or rank_key is None


@EVERY
def test_unknown_group_key_is_refused(name):
    _, rest = parts_of(small_model())
    with pytest.raises(ds_lowrank.ConfigError, match="did you mean 'weight_decay'"):
        OPTIMIZERS[name]([{"params": rest, "weight_deccay": 0.1}], **of(name).small)


def test_group_may_switch_mini_and_gets_the_defaults_of_that():
    first, rest = parts_of(small_model())
    optimizer = OPTIMIZERS["Apollo"]([{"params": first, "mini": True}, {"params": rest}], lr=0.1)
    assert [(group["rank"], group["scale"]) for group in optimizer.param_groups] == [(1, 128**0.5), (128, 1.0)]
    assert [slot.rank for slot in optimizer.slots if slot.is_projected] == [1, 7]
    optimizer = OPTIMIZERS["Apollo"]([{"params": first, "mini": False}, {"params": rest}], lr=0.1, mini=True)
    assert [(group["rank"], group["scale"]) for group in optimizer.param_groups] == [(128, 1.0), (1, 128**0.5)]


@EVERY
def test_groups_in_another_order_are_refused(name):
    model = small_model()
    ds_lowrank.tag_parameters(model)
    first, rest = ({"params": part.named_parameters(prefix=str(i)), "lr": i} for i, part in enumerate(model) if i != 1)
    saved = OPTIMIZERS[name]([first, rest], **of(name).small).state_dict()
    rest, first = ({"params": part.named_parameters(prefix=str(i)), "lr": i} for i, part in enumerate(model) if i != 1)
    with pytest.raises(ds_lowrank.CheckpointError, match="parameter group 0 has other parameters"):
        OPTIMIZERS[name]([first, rest], **of(name).small).load_state_dict(saved)


@EVERY
def test_group_may_be_a_generator_and_be_added_later(name):
    model = small_model()
    ds_lowrank.tag_parameters(model)
    group = {"params": model[0].named_parameters(prefix="0"), "lr": 1, "betas": [0.8, 0.9]}
    optimizer = OPTIMIZERS[name]([group], **of(name).small)
    optimizer.add_param_group({"params": model[2].named_parameters(prefix="2")})
    assert len(optimizer.slots) == 4
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]) == (1.0, (0.8, 0.9))


@EVERY
def test_pattern_of_a_group_that_matches_nothing_is_refused(name):
    with pytest.raises(ds_lowrank.ConfigError, match=r"'\*typo\*' matches no parameter"):
        model = small_model()
        ds_lowrank.tag_parameters(model)
        groups = [{"params": model.named_parameters(), "exclude_modules": ["*typo*"]}]
        OPTIMIZERS[name](groups, **of(name).small)


@EVERY
def test_frozen_parameters_may_have_any_dtype(name):
    model = small_model()
    model.register_parameter("scales", torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    optimizer = build(name, model)
    run(optimizer, model, range(1))
    assert len(optimizer.slots) == 4
    assert torch.equal(model.scales, torch.ones(3, dtype=torch.int8))
