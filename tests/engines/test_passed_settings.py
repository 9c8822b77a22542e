"""Settings of DeepSpeed that change how gradients and weights travel, and must not change the update."""

from __future__ import annotations

import functools

import pytest

from tests.engines.pool import run_ranks
from tests.engines.scenario import Oracle, config, max_relative_difference, run_engine
from tests.engines.trace import trace_engine, worst_against_references

STEPS = 3


@functools.cache
def expected():
    oracle = Oracle(clip=0.5)
    for step in range(STEPS):
        oracle.step(step)
    return oracle.weights()


FETCHING = {
    "stage3_use_all_reduce_for_fetch_params": True,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "memory_efficient_linear": False,
    "leaf_module": {"names": ["model.layers.0"]},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "zero", "more"),
    [
        (0, {}, {"prescale_gradients": True}),
        (0, {}, {"gradient_predivide_factor": 2.0, "communication_data_type": "fp32"}),
        (1, {"parameter_alignment": True, "allgather_partitions": False}, {"gradient_predivide_factor": 2.0}),
        (2, {"parameter_alignment": True, "use_multi_rank_bucket_allreduce": False}, {}),
        (3, FETCHING, {}),
        (3, {"stage3_allgather_sequential": True, "stage3_param_persistence_threshold": 0}, {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_the_weights_are_those_of_the_dense_reference(stage, zero, more):
    settings = config(stage, 2, clip=0.5, zero_optimization=zero, **more)
    for result in run_ranks(2, run_engine, settings, STEPS):
        assert max_relative_difference(result["last"], expected()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype", "more"),
    [
        (0, "fp32", {"communication_data_type": "bf16"}),
        (2, "fp32", {"communication_data_type": "bf16"}),
        (2, "bf16", {"communication_data_type": "fp32", "data_types": {"param_dtype": "bf16"}}),
        (2, "fp32", {"gradient_allreduce_op": "sum"}),
        (1, "bf16_fp32_accumulation", {"bf16": {"enabled": True, "immediate_grad_update": True}}),
    ],
    ids=str,
)
def test_the_update_is_that_of_the_gradient_that_is_presented(stage, dtype, more):
    """With gradients reduced in fewer bits, or summed, the method must still be applied to exactly what arrives."""
    settings = config(stage, 2, dtype=dtype, gas=2, clip=0.5) | more
    assert worst_against_references(run_ranks(2, trace_engine, settings, STEPS, False)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "wrapper"),
    [
        ({"zero_optimization": True}, "DeepSpeedZeroOptimizer"),
        ({"zero_optimization": False, "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "GaLore"),
        ({"zero_optimization": {"stage": "auto"}, "tensor_parallel": {"autotp_size": 0}}, "GaLore"),
    ],
    ids=str,
)
def test_what_deepspeed_reads_as_something_else_is_read_as_that(block, wrapper):
    for result in run_ranks(2, run_engine, config(0, 2, clip=0.5) | block, STEPS):
        assert result["wrapper"] == wrapper
        assert max_relative_difference(result["last"], expected()) < 1e-5
