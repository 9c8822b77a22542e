"""Runs in which the method would do nothing, or leave a layer out, stop on every rank of an engine."""

from __future__ import annotations

import pytest
import torch

from tests.engines.grids import PIPELINE, Grid, initialize_error, plain_pipeline, settings_of
from tests.engines.pool import run_ranks
from tests.engines.scenario import Oracle, config, full_weights, make_model, max_relative_difference, train_step


def unfreeze(settings):
    """The weights after a layer was unfrozen behind the first step, or the error."""
    import ds_lowrank

    model = make_model()
    layer = model.model.layers[0].requires_grad_(False)
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    train_step(engine, 0)
    layer.requires_grad_(True)
    try:
        train_step(engine, 1)
    except ds_lowrank.ConfigError as error:
        return str(error)
    return full_weights(engine)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_gradient_of_a_layer_that_was_frozen_at_start_stops_every_rank(stage, dtype):
    for error in run_ranks(2, unfreeze, config(stage, 2, dtype)):
        assert error.startswith("model.layers.0.self_attn.q_proj.weight was frozen when the optimizer was set up, and")
        assert "(9 such parameters in all)" in error
        assert "unfreeze before the engine is built, build a new engine, or keep it frozen" in error


class Branch(torch.nn.Module):
    """A layer, and another one that only some of the data reach."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x, further):
        x = self.always(x)
        return (self.sometimes(x) if further else x).square().mean()


def unfreeze_for_rank_0(settings):
    """The error after a layer was unfrozen that only the data of rank 0 reach."""
    import torch.distributed as dist

    import ds_lowrank

    model = Branch()
    engine, *_ = ds_lowrank.initialize(model=model, config=settings)
    model.sometimes.requires_grad_(True)
    engine.backward(engine(torch.ones(2, 8), dist.get_rank() == 0))
    with pytest.raises(ds_lowrank.ConfigError) as error:
        engine.step()
    return str(error.value)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_one_rank_alone_has_stops_every_rank(stage):
    for error in run_ranks(2, unfreeze_for_rank_0, config(stage, 2), timeout=60):
        assert error.startswith("sometimes.weight was frozen when the optimizer was set up, and has a gradient now (2 ")


def test_without_a_wrapper_the_layer_is_trained_from_then_on():
    oracle = Oracle()
    for step in range(2):
        oracle.model.model.layers[0].requires_grad_(step > 0)
        oracle.step(step)
    for weights in run_ranks(2, unfreeze, config(0, 2)):
        assert max_relative_difference(weights, oracle.weights()) < 1e-4


def without_matrices(settings, frozen):
    model = make_model()
    for parameter in model.parameters():
        parameter.requires_grad = parameter.ndim == 1 or not frozen
    return initialize_error(model, settings)


def test_nothing_to_project_stops_every_rank():
    for error in run_ranks(2, without_matrices, config(2, 2), True):
        assert "GaLore has nothing to project" in error and "5 x 1-D" in error
        assert "unfreeze some of the 14 frozen matrices" in error
    for error in run_ranks(2, without_matrices, config(0, 2, params={"exclude_modules": ["*.layers.*"]}), False):
        assert "14 x exclude_modules '*.layers.*' (model.layers.0.self_attn.q_proj.weight, " in error


def all_frozen(settings):
    return initialize_error(make_model().requires_grad_(False), settings)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "bf16"), (2, "fp32"), (3, "fp32")])
def test_a_model_that_is_frozen_as_a_whole_stops_every_rank(stage, dtype):
    for error in run_ranks(2, all_frozen, config(stage, 2, dtype)):
        assert "every parameter of the model is frozen: unfreeze some before the engine is built" in error


def pipeline_without_matrices(stage, excluded):
    settings = settings_of(Grid(1, 1, 2, stage), params={"exclude_modules": excluded})
    return initialize_error(plain_pipeline(), settings)


@pytest.mark.parametrize("stage", [0, 1])
def test_one_stage_of_a_pipeline_may_have_nothing_to_project_but_not_all(stage):
    assert run_ranks(2, pipeline_without_matrices, stage, ["1.weight"]) == ["", ""]
    for error in run_ranks(2, pipeline_without_matrices, stage, ["0.weight", "1.weight"]):
        assert "GaLore has nothing to project" in error


def test_a_target_that_is_never_projected_stops_every_stage():
    for error in run_ranks(2, with_targets, ["1.weight", "0.bias"]):
        assert "target_modules: '0.bias' matches only parameters that are never projected: 0.bias (1-D)" in error


def with_targets(targets):
    return initialize_error(plain_pipeline(), settings_of(PIPELINE, params={"target_modules": targets}))
