"""Which process groups are which axis: by their ranks, not by one of their names; what leaves out ranks is refused."""

from __future__ import annotations

import functools

import pytest

from tests.engines.grids import message_of, own_initialize_error, plain_pipeline
from tests.engines.pool import run_ranks
from tests.engines.scenario import (
    Oracle,
    config,
    full_weights,
    make_model,
    max_relative_difference,
    tokens,
    train_step,
)
from tests.engines.ulysses import Unit, settings_of, start


@functools.cache
def after_one_step():
    """The dense weights."""
    oracle = Oracle()
    oracle.step(0)
    return oracle.weights()


@pytest.mark.parametrize("stage", range(4))
def test_a_mesh_with_a_sequence_dimension_is_refused_on_every_way_in(stage):
    for errors in run_ranks(2, with_a_mesh, stage):
        assert set(errors) == {"mesh_param", "data_parallel_size", "stock mesh_param", "stock data_parallel_size"}
        for way, error in errors.items():
            assert "pass mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp" in error, way


def with_a_mesh(stage):
    sizes = {"data_parallel_size": 1, "sequence_parallel_size": 2}

    settings = settings_of(stage, 1)
    del settings["train_batch_size"]  # at ZeRO 3 DeepSpeed counts the ranks of the mesh in two ways
    return {
        "mesh_param": own_initialize_error(make_model(), settings, mesh_param=(1, 2)),
        "data_parallel_size": own_initialize_error(make_model(), settings | sizes),
        "stock mesh_param": stock_error(settings, mesh_param=(1, 2)),
        "stock data_parallel_size": stock_error(settings | sizes),
    }


def stock_error(settings, **given):
    """The error in the first step of an engine that DeepSpeed's own function builds."""
    from deepspeed import initialize

    import ds_lowrank

    def train():
        ds_lowrank.register()
        model, batch = make_model(), tokens(0)
        ds_lowrank.tag_parameters(model)
        engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=settings, **given)
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()

    return message_of(train)


@pytest.mark.parametrize("stage", range(4))
def test_a_mesh_of_data_parallel_ranks_takes_the_dense_step(stage):
    expected = after_one_step()
    for weights in run_ranks(2, with_a_data_mesh, stage):
        assert max_relative_difference(weights, expected) < 1e-5


def with_a_data_mesh(stage):
    import ds_lowrank

    engine, *_ = ds_lowrank.initialize(model=make_model(), config=config(stage, 2), mesh_param=(2, 1))
    train_step(engine, 0)
    return full_weights(engine)


UNITS = {
    "sequence and tensor": (
        {"sequence_parallel": (2, 1), "tensor_model_parallel": (2, 2), "sequence_data_parallel": (2, 1)},
        "the mpu has sequence groups (Ulysses), and tensor or pipeline parallelism too",
    ),
    "sequence and pipeline": (
        {"sequence_parallel": (2, 1), "pipe_parallel": (2, 2), "sequence_data_parallel": (2, 1)},
        "the mpu has sequence groups (Ulysses), and tensor or pipeline parallelism too",
    ),
    "context": (
        {"data_parallel": (2, 2), "context_parallel": (2, 1)},
        "Set context_parallel_size to 1",
    ),
    "unknown": (
        {"data_parallel": (2, 2), "ring": (2, 1)},
        "data-parallel 2 x tensor-parallel 1 x pipeline 1",
    ),
    "sequence without joint group": (
        {"data_parallel": (2, 2), "sequence_parallel": (2, 1)},
        "data-parallel 2 x tensor-parallel 1 x pipeline 1",
    ),
    "tensor in data": (
        {"data_parallel": (4, 1), "tensor_model_parallel": (2, 1)},
        "are in one data-parallel group and in one tensor-parallel group",
    ),
    "tensor and pipeline in one": (
        {"data_parallel": (2, 1), "model_parallel": (2, 1), "pipe_parallel": (2, 2)},
        "are in one data-parallel group and in one tensor-parallel group",
    ),
    "no data": ({"tensor_model_parallel": (4, 1)}, "the mpu has none of get_sequence_data_parallel_group"),
}


def test_units_whose_axes_are_not_a_grid_are_refused():
    for errors in run_ranks(4, with_units):
        for name, (_, message) in UNITS.items():
            assert message in errors[name], name


def with_units():
    return {
        name: own_initialize_error(make_model(), settings_of(1, 2), mpu=Unit(**strides))
        for name, (strides, _) in UNITS.items()
    }


@pytest.mark.parametrize("stage", range(4))
def test_stock_engines_with_an_unknown_axis_are_refused_in_their_first_step(stage):
    for error in run_ranks(4, with_an_unknown_axis, stage):
        assert "data-parallel 2 x tensor-parallel 1 x pipeline 1" in error


def with_an_unknown_axis(stage):
    unit = Unit(data_parallel=(2, 2), model_parallel=(1, 1), ring=(2, 1))
    return stock_error(settings_of(stage, 2), mpu=unit)


@pytest.mark.parametrize("unit", ["parallel_state_sp", "megatron-core"])
def test_a_unit_without_groups_is_refused(unit):
    for error in run_ranks(2, with_a_unit_without_groups, unit):
        assert "the groups of the mpu do not exist yet" in error


def with_a_unit_without_groups(unit):
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from megatron.core import parallel_state

    mpu = parallel_state_sp if unit == "parallel_state_sp" else parallel_state
    return own_initialize_error(make_model(), settings_of(1, 2), mpu=mpu)


NAMES = {
    "Megatron's first": ({"model_parallel": (2, 1), "data_parallel": (2, 2)}, (2, 1)),
    "DeepSpeed's sequence": ({"model_parallel": (2, 1), "sequence_parallel": (2, 1)}, (1, 1)),
    "Megatron-DeepSpeed": (
        {"model_parallel": (4, 1), "tensor_model_parallel": (2, 1), "sequence_parallel": (1, 1)},
        (2, 1),
    ),
    "a pipeline grid": ({"model_parallel": (4, 1), "slice_parallel": (2, 1), "pipe_parallel": (2, 2)}, (2, 2)),
    "a pipeline alone": ({"model_parallel": (2, 2), "pipe_parallel": (2, 2), "data_parallel": (2, 1)}, (1, 2)),
}


def test_no_group_is_taken_for_another_axis_by_one_of_its_names():
    for sizes in run_ranks(4, sizes_of_units):
        assert sizes == {name: expected for name, (_, expected) in NAMES.items()}


def sizes_of_units():
    from ds_lowrank.placement.grid import grid_of

    grids = {name: grid_of(Unit(**strides)) for name, (strides, _) in NAMES.items()}
    return {name: (grid.tensor_size, grid.pipeline_size) for name, grid in grids.items()}


def test_a_unit_made_without_sequence_groups_has_none():
    assert run_ranks(1, sequence_size_of_a_unit_without) == [1]


def sequence_size_of_a_unit_without():
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    from ds_lowrank.placement.grid import sequence_size

    return sequence_size(parallel_state_sp)


def test_a_size_of_sequence_groups_that_the_groups_do_not_have_is_refused():
    for errors in run_ranks(2, with_sizes):
        assert "parallel_state_sp, after its initialize_sequence_parallel, to ds_lowrank.initialize" in errors[0]
        assert "but the mpu has sequence groups of 2" in errors[1]
        assert errors[2] == ""


def with_sizes():
    settings = settings_of(2, 1)
    without = own_initialize_error(make_model(), settings | {"sequence_parallel_size": 2})
    with_groups = [message_of(lambda size=size: start(settings | {"sequence_parallel_size": size}, 2)) for size in (4,)]
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as mpu

    right = own_initialize_error(make_model(), settings | {"sequence_parallel_size": 2}, mpu=mpu)
    return [without, *with_groups, right]


LEFT = {
    "tensor-parallel groups of megatron-core": "",
    "an engine with AutoTP": "the process groups of an earlier engine are still set",
    "an engine with a pipeline": "the process groups of an earlier engine are still set",
    "an engine with sequence groups": "the process groups of an earlier engine are still set",
}


@pytest.mark.parametrize("left", LEFT)
def test_groups_that_an_earlier_engine_left_are_not_taken_for_an_axis(left):
    """DeepSpeed itself uses what is left in its module of groups. What is only left in megatron-core's is ignored."""
    found = run_ranks(2, after, left)
    for error, weights in found:
        assert LEFT[left] in error and bool(error) == bool(LEFT[left])
        if not error:
            assert max_relative_difference(weights, after_one_step()) < 1e-5


def after(left):
    import ds_lowrank

    settings = config(2, 2)
    if left == "tensor-parallel groups of megatron-core":
        ds_lowrank.make_grid(2, 1)
        engine, *_ = ds_lowrank.initialize(model=make_model(), config=settings)
        train_step(engine, 0)
        return "", full_weights(engine)
    if left == "an engine with AutoTP":
        autotp = settings_of(1, 1) | {"tensor_parallel": {"autotp_size": 2}}
        del autotp["train_batch_size"]
        ds_lowrank.initialize(model=make_model(), config=autotp)
    elif left == "an engine with a pipeline":
        ds_lowrank.initialize(model=plain_pipeline(), config=settings_of(1, 1))
    else:
        start(settings_of(1, 1), 2)
    return own_initialize_error(make_model(), settings), {}


def test_parameters_that_zero_init_splits_over_a_part_of_the_ranks_are_refused():
    for error in run_ranks(2, split_over_one_rank):
        assert "data-parallel 1 x tensor-parallel 1 x pipeline 1" in error


def split_over_one_rank():
    import deepspeed
    import torch.distributed as dist

    groups = [dist.new_group([rank]) for rank in range(2)]
    settings = config(3, 2)
    with deepspeed.zero.Init(data_parallel_group=groups[dist.get_rank()], config_dict_or_path=settings):
        model = make_model()
    return own_initialize_error(model, settings)
