"""DeepSpeed's sequence parallelism (Ulysses) takes the dense step at every ZeRO stage, however the engine is built."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.engines.grids import message_of
from tests.engines.pairwise import pairwise
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, Oracle, full_weights, make_model, max_relative_difference
from tests.engines.trace import worst_against_references
from tests.engines.ulysses import run_ulysses, settings_of, start, trace_ulysses, train_step

STEPS = 5  # refreshes, where there are any, at steps 0 and 4
AXES = {
    "method": sorted(METHODS),
    "stage": [0, 1, 2, 3],
    "ranks": [(2, 2), (4, 2), (4, 4)],  # all ranks, and those of a sequence group
    "clip": [0.0, 0.5],
    "gas": [1, 2],
    "stock": [False, True],
}
CASES = pairwise(AXES, lambda case: True)


@functools.cache
def oracle(method, clip):
    dense = Oracle(clip, method=method)
    dense.step(0)
    first = dense.weights()
    for step in range(1, STEPS):
        dense.step(step)
    return [first, dense.weights()], dense.norms


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_ranks_of_a_sequence_group_take_the_dense_step(case):
    world, size = case["ranks"]
    settings = settings_of(case["stage"], world // size, method=case["method"], gas=case["gas"], clip=case["clip"])
    results = run_ranks(world, run_ulysses, settings, size, STEPS, stock=case["stock"])
    assert_dense(results, case["method"], case["clip"], norms=case["stage"] > 0)


def assert_dense(results, method, clip, norms):
    weights, expected_norms = oracle(method, clip)
    for result in results:
        for own, expected, bound in zip(result["weights"], weights, (1e-5, 1e-4), strict=True):
            assert max_relative_difference(own, expected) < bound
        if norms:  # in fp32 at ZeRO 0 DeepSpeed keeps none
            assert abs(result["norms"][0] / expected_norms[0] - 1) < 1e-6
        assert result["metrics"]["lowrank/projected_matrices"] == 14


@pytest.mark.parametrize("stage", [0, 1])
def test_a_unit_like_megatron_deepspeeds_takes_the_dense_step(stage):
    """Its tensor, pipeline and model-parallel groups have one rank each; it has a data group and a joint one."""
    results = run_ranks(4, run_ulysses, settings_of(stage, 2, clip=0.5), 2, STEPS, megatron=True)
    assert_dense(results, "GaLore", 0.5, norms=stage > 0)


@pytest.mark.parametrize("stock", [False, True])
def test_a_unit_like_megatron_deepspeeds_is_refused_at_zero_3(stock):
    """DeepSpeed splits the parameters over its data group there, and averages gradients over that alone."""
    for error in run_ranks(4, start_error, settings_of(3, 2), 2, megatron=True, stock=stock):
        assert "data-parallel 2 x tensor-parallel 1 x pipeline 1" in error


@pytest.mark.parametrize("stage", range(4))
def test_bf16_steps_on_the_presented_gradient(stage):
    traces = run_ranks(2, trace_ulysses, settings_of(stage, 1, "bf16", gas=2, clip=0.5), 2, 3)
    assert worst_against_references(traces) < 1e-5
    assert abs(traces[0]["norms"][0] / oracle("GaLore", 0.5)[1][0] - 1) < 1e-2  # bf16 has three digits


def test_a_wrapper_that_finds_no_norm_on_sequence_ranks_is_refused():
    settings = settings_of(1, 1, "bf16_fp32_accumulation")
    assert all("Remove data_types" in error for error in run_ranks(2, start_error, settings, 2))


def start_error(settings, size, **options):
    return message_of(lambda: start(settings, size, **options).basic_optimizer.bind())


def test_a_model_built_under_zero_init_takes_the_dense_step():
    """Without an mpu yet, DeepSpeed reads the size of the groups from the JSON."""
    settings = settings_of(3, 1, clip=0.5) | {"sequence_parallel_size": 2}
    assert_dense(run_ranks(2, run_ulysses, settings, 2, STEPS, zero_init=True), "GaLore", 0.5, norms=True)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, tmp_path):
    for whole, resumed in run_ranks(2, interrupted, stage, str(tmp_path)):
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def interrupted(stage, folder):
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as mpu

    import ds_lowrank

    engine = start(settings_of(stage, 1, "bf16"), 2)
    train_step(engine, 0)
    engine.save_checkpoint(folder)
    train_step(engine, 1)
    resumed, *_ = ds_lowrank.initialize(model=make_model(), config=settings_of(stage, 1, "bf16"), mpu=mpu)
    resumed.load_checkpoint(folder)
    train_step(resumed, 1)
    return full_weights(engine), full_weights(resumed)


def test_an_exported_checkpoint_is_the_whole_model():
    (weights, _), expected = run_ranks(2, gathered), oracle("GaLore", 0.0)[0][0]
    assert max_relative_difference(weights, expected) < 1e-5


def gathered():
    from ds_lowrank.checkpoint.gather import whole_weights

    engine = start(settings_of(3, 1), 2)
    train_step(engine, 0)
    return whole_weights(engine)
