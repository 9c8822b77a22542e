"""Engines whose weights are in bf16 without fp32 copies, at every ZeRO stage."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from ds_lowrank.checkpoint.gather import whole_weights
from ds_lowrank.errors import ConfigError
from tests.engines.grids import Grid, dense_model, oracle
from tests.engines.grids import settings_of as grid_settings
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, config, full_weights, make_model, make_model_for, train_step

STEPS = 6
WRAPPERS = ["GaLore", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"]
"""What steps, by the ZeRO stage: at ZeRO 0 the optimizer itself."""


def settings_of(stage, world, method="GaLore", params=None, clip=0.5, **changes):
    params = {"master_weights": False, **(params or {})}
    return config(stage, world, "bf16", gas=2, clip=clip, method=method, params=params, **changes)


def weights_of(engine):
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def train(settings, steps=STEPS, directory=None, interrupt=None, zero_init=False):
    """Train, interrupted or not; the weights that this rank's forward passes read, and how they are stored."""
    import ds_lowrank

    def engine_of():
        return ds_lowrank.initialize(model=make_model_for(settings, zero_init), config=settings)[0]

    engine = engine_of()
    for step in range(steps):
        if step == interrupt:
            engine.save_checkpoint(directory, tag="here")
            engine = engine_of()
            engine.load_checkpoint(directory, tag="here")
        train_step(engine, step)
    return {
        "weights": weights_of(engine),
        "wrapper": type(engine.optimizer).__name__,
        "stored": {str(slot.fragment.store.dtype) for slot in engine.basic_optimizer.slots},
        "metrics": engine.basic_optimizer.metrics(),
    }


@functools.cache
def alone(stage, method="GaLore"):
    # DeepSpeed adds up the norm that it clips to in another order at ZeRO 0, and the last bit of the share by which
    # gradients are clipped decides how a few elements are rounded: nothing is clipped here.
    # SUMO's rest is a product whose larger side is cut into pieces, of other sizes at other stages: last bits differ.
    params = {"complement": 0.0} if method == "Sumo" else {}
    (found,) = run_ranks(1, train, settings_of(stage, 1, method, params, clip=0.0))
    return found


@functools.cache
def on_two_ranks(stage):
    return run_ranks(2, train, settings_of(stage, 2))


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", range(4))
def test_no_weight_is_stored_in_fp32(stage):
    found = alone(stage)
    assert found["wrapper"] == WRAPPERS[stage]
    assert found["stored"] == {"torch.bfloat16"}
    assert {weight.dtype for weight in found["weights"].values()} == {torch.bfloat16}
    assert found["metrics"]["lowrank/projected_matrices"] == 14


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_gives_the_same_bits(stage):
    assert_same_bits(alone(stage)["weights"], alone(0)["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"GaLore"}))
@pytest.mark.parametrize("stage", [2, 3])
def test_every_stage_gives_the_same_bits_with_every_method(stage, method):
    assert_same_bits(alone(stage, method)["weights"], alone(0, method)["weights"])


@pytest.mark.parametrize("stage", range(4))
def test_ranks_have_the_same_bits_and_move_as_with_fp32_copies(stage):
    """Six roundings are off by a unit in the last place in the root of the mean square, 2^-8 to 2^-7 of the weight.

    The copies' own rounding in the forward pass, and gradients at slightly other weights, may add as much.
    """
    first, second = on_two_ranks(stage)
    assert_same_bits(first["weights"], second["weights"])
    with_masters, _ = run_ranks(2, train, settings_of(stage, 2, params={"master_weights": True}))
    start = dict(make_model().named_parameters())
    for name, weight in with_masters["weights"].items():
        distance = (weight.float() - first["weights"][name].float()).norm()
        assert distance < 2 * 2**-7 * weight.float().norm()
        assert distance < 0.5 * (weight.float() - start[name]).norm()


@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run_continues_bit_for_bit(stage, tmp_path):
    resumed = run_ranks(2, train, settings_of(stage, 2), STEPS, str(tmp_path), 3)
    for through, again in zip(on_two_ranks(stage), resumed, strict=True):
        assert_same_bits(through["weights"], again["weights"])


def test_under_zero_init_and_with_fp32_accumulation():
    plain, _ = run_ranks(2, train, settings_of(3, 2), STEPS, None, None, True)
    assert plain["stored"] == {"torch.bfloat16"}
    settings = settings_of(2, 2) | {"data_types": {"grad_accum_dtype": "fp32"}}
    first, second = run_ranks(2, train, settings)
    assert first["stored"] == {"torch.bfloat16"}
    assert_same_bits(first["weights"], second["weights"])


def refusal(settings, own=None):
    import ds_lowrank

    model = make_model()
    optimizer = None if own is None else ds_lowrank.GaLore(model, rank=4, **own)
    if own is not None:
        settings = {key: value for key, value in settings.items() if key != "optimizer"}
    try:
        ds_lowrank.initialize(model=model, config=settings, optimizer=optimizer)
    except ConfigError as error:
        return str(error)
    return ""


ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
REFUSED = [
    (0, {"bf16": {"enabled": False}}, {}, "trains in fp32: it is for weights in bf16. Set bf16.enabled to true"),
    (2, {"bf16": {"enabled": False}}, {}, "trains in fp32: it is for weights in bf16. Set bf16.enabled to true"),
    (1, ACCUMULATION, {}, "DeepSpeed keeps fp32 copies of the weights, although .*Set zero_optimization.stage to 2"),
    (0, ACCUMULATION, {}, "grad_accum_dtype 'fp32' with bf16 needs ZeRO"),
    (2, {"bf16": {"enabled": True, "bf16_optimizer_states": False}}, {}, "bf16_optimizer_states is false, and so is"),
    (0, {"bf16": {"enabled": True, "bf16_optimizer_states": True}}, {}, "is for ZeRO 1 to 3: remove it"),
    (
        2,
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        {"master_weights": True},
        "bf16_master_weights_and_grads is not supported with GaLore: set optimizer.params.master_weights to false",
    ),
]


@pytest.mark.parametrize(("stage", "changes", "params", "message"), REFUSED)
def test_what_would_keep_copies_is_refused_on_every_rank(stage, changes, params, message):
    for error in run_ranks(2, refusal, settings_of(stage, 2, params=params) | changes):
        assert re.search(message, error), error


@pytest.mark.parametrize("stage", [0, 2])
def test_a_client_optimizer_decides_itself(stage):
    assert run_ranks(2, refusal, settings_of(stage, 2), {"master_weights": False}) == ["", ""]
    keys = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    (error, _) = run_ranks(2, refusal, settings_of(2, 2) | keys, {})
    assert "set optimizer.params.master_weights to false" in error


def both_keys(stage):
    keys = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return settings_of(stage, 1, clip=0.0) | {"bf16": {"enabled": True, **keys}}


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_own_keys_mean_the_same(stage):
    (found,) = run_ranks(1, train, both_keys(stage))
    assert_same_bits(found["weights"], alone(0)["weights"])


def save(settings, directory):
    import ds_lowrank

    engine = ds_lowrank.initialize(model=make_model(), config=settings)[0]
    train_step(engine, 0)
    engine.save_checkpoint(directory, tag="here")
    return full_weights(engine)


def load(settings, directory):
    import ds_lowrank

    engine = ds_lowrank.initialize(model=make_model(), config=settings)[0]
    engine.load_checkpoint(directory, tag="here")
    return full_weights(engine)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_opens_with_and_without_masters(stage, saved, tmp_path):
    """Masters are the bf16 weights, exactly; without masters, weights are the masters rounded to nearest."""
    there = run_ranks(2, save, settings_of(stage, 2, params={"master_weights": saved}), str(tmp_path))
    here = run_ranks(2, load, settings_of(stage, 2, params={"master_weights": not saved}), str(tmp_path))
    for before, after in zip(there, here, strict=True):
        for name, weight in before.items():
            assert torch.equal(weight.bfloat16().float() if saved else weight, after[name]), name


GRID_LAYOUTS = [
    Grid(1, 1, 2, 0),
    Grid(1, 2, 1, 0),
    Grid(1, 2, 1, 0, "autotp"),
    Grid(2, 1, 2, 1),
    Grid(2, 2, 1, 2),
    Grid(2, 2, 1, 3, "autotp"),
]


def train_grid(grid, settings, **changes):
    """Three steps; the whole weights, this rank's copies of what it shares with others, and the norms."""
    from tests.engines.grids import start, train_step

    engine = start(grid, settings, **changes)
    norms = []
    for step in range(3):
        train_step(engine, step)
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    slots = [
        slot for slot in engine.basic_optimizer.slots if slot.logical.placement == "replicated" or grid.tensor == 1
    ]
    own = {slot.tag.name: slot.parameter.detach().clone() for slot in slots if slot.parameter.numel()}
    return {"weights": whole_weights(engine), "copies": own, "norms": norms}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "changes"), [*((grid, {}) for grid in GRID_LAYOUTS), (Grid(1, 1, 2, 0), {"tie_word_embeddings": True})]
)
def test_grids_move_as_one_process_and_copies_have_the_same_bits(grid, changes):
    """Three steps in bf16 keep most of the direction that one process in fp32 takes, as with fp32 copies."""
    settings = grid_settings(grid, gas=2, dtype="bf16", params={"master_weights": False})
    results = run_ranks(grid.world, train_grid, grid, settings, **changes)
    (_, last), norms = oracle("GaLore", 0.0, 3, **changes)
    start = dict(dense_model(**changes).named_parameters())
    for name, weight in last.items():
        distance = (results[0]["weights"][name].float() - weight).norm()
        assert distance < 0.5 * (weight - start[name]).norm(), name
    assert results[0]["norms"] == pytest.approx(norms, rel=0.02)
    shared = [name for own in results for name in own["copies"]]
    assert any(shared.count(name) > 1 for name in shared) or (grid == Grid(1, 1, 2, 0) and not changes)
    for own in results:
        for name, weight in own["copies"].items():
            first = next(other["copies"][name] for other in results if name in other["copies"])
            assert torch.equal(weight, first), name
