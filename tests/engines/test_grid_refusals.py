"""What a grid refuses at start, on every rank, and what only one stage of a pipeline can see."""

from __future__ import annotations

import pytest
import torch

from tests.engines.grids import (
    PIPELINE,
    Grid,
    dense_model,
    initialize_error,
    llama_config,
    own_initialize_error,
    plain_pipeline,
    run_grid,
    settings_of,
    start_error,
)
from tests.engines.pool import run_ranks

REFUSED = [
    (Grid(1, 1, 2, 2), {}, "set one of them"),
    (Grid(1, 2, 1, 0), {"dtype": "bf16"}, "Set zero_optimization.stage to 1"),
    (Grid(1, 2, 1, 0, "autotp"), {"dtype": "bf16"}, "Set zero_optimization.stage to 1"),
    (Grid(1, 2, 2, 0), {"fp16": {"enabled": True}}, "fp16 at ZeRO 0"),
    (PIPELINE, {"fp16": {"enabled": True}}, "fp16 at ZeRO 0"),
    (Grid(1, 1, 1, 0, "autotp"), {"fp16": {"enabled": True}}, "fp16 at ZeRO 0"),
    (PIPELINE, {"method": "Lorenza", "params": {"accumulation": "per_micro_batch"}}, "set accumulation to 'per_step'"),
    (PIPELINE, {"params": {"target_modules": ["*nothing*"]}}, "'*nothing*' matches no parameter"),
    (
        Grid(1, 2, 1, 1, "autotp"),
        {"method": "GradNormLoRP", "params": {"parametrization": "adapter"}},
        "adapters are not split over ranks",
    ),
    (
        Grid(1, 2, 1, 0),
        {"method": "VLoRP", "params": {"left_view": "official"}},
        "set left_view to 'transpose'",
    ),
]


@pytest.mark.parametrize(("grid", "changes", "message"), REFUSED, ids=str)
def test_an_unsupported_setting_stops_every_rank_at_start(grid, changes, message):
    for error in run_ranks(grid.world, start_error, grid, settings_of(grid, **changes)):
        assert message in error


def test_a_pattern_may_match_on_one_stage_only():
    settings = settings_of(PIPELINE, params={"exclude_modules": ["*layers.1.mlp*"]})
    results = run_ranks(2, run_grid, PIPELINE, settings, 1)
    assert [result["metrics"]["lowrank/projected_matrices"] for result in results] == [7, 4]


def test_an_unsupported_shape_on_one_stage_stops_both():
    errors = run_ranks(2, with_an_unsupported_shape_on_the_last_stage)
    assert "7 x 7: granularity 3 does not fit" in errors[1]
    assert "rank 1" in errors[0] and "7 x 7: granularity 3 does not fit" in errors[0]


def with_an_unsupported_shape_on_the_last_stage():
    from deepspeed.pipe import LayerSpec, PipelineModule
    from torch import nn

    layers = [LayerSpec(nn.Linear, 6, 6), LayerSpec(nn.Linear, 6, 7), LayerSpec(nn.Linear, 7, 7)]
    model = PipelineModule(layers, num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    settings = settings_of(PIPELINE, method="VLoRP", params={"granularity": 3, "exclude_modules": ["1.weight"]})
    return initialize_error(model, settings)


def test_autotp_in_a_pipeline_is_refused():
    for error in run_ranks(2, autotp_in_a_pipeline):
        assert "tensor_parallel.autotp_size creates its own grid" in error


def autotp_in_a_pipeline():
    return start_error(PIPELINE, settings_of(PIPELINE) | {"tensor_parallel": {"autotp_size": 2}})


def test_groups_missing_on_one_stage_are_refused_where_deepspeed_hangs():
    for stage, message in ((1, "the stages of the pipeline have [2, 1] parameter groups"), (0, "")):
        assert run_ranks(2, biases_on_one_stage, stage) == [message] * 2


def biases_on_one_stage(stage):
    model = plain_pipeline()
    named = list(model.named_parameters())
    groups = [
        {"params": [pair for pair in named if pair[0].endswith(".weight")]},
        {"params": [pair for pair in named if pair[0].endswith(".bias")]},
    ]
    groups = [group for group in groups if group["params"]]
    error = own_initialize_error(model, settings_of(Grid(1, 1, 2, stage)), model_parameters=groups)
    return error.partition(" that are not empty")[0]


def test_experts_on_one_stage_stop_both():
    errors = run_ranks(2, experts_on_the_first_stage)
    assert all("expert parallelism is not supported yet" in error for error in errors)


def experts_on_the_first_stage():
    model = plain_pipeline()
    for name, parameter in model.named_parameters():
        parameter.allreduce = not name.startswith("0.")
    return initialize_error(model, settings_of(PIPELINE))


def test_sequence_parallel_layers_on_one_stage_decide_for_both():
    assert run_ranks(2, partitioned_activations) == [(False, False)] * 2


def partitioned_activations():
    from ds_lowrank.integration.stages import with_whole_activations
    from ds_lowrank.placement.grid import grid_of

    model = plain_pipeline()
    for name, module in model.named_modules():
        module.sequence_parallel = name == "1"
    pipeline = with_whole_activations(model, {}, grid_of(model.mpu()))["pipeline"]
    return pipeline["pipe_partitioned"], pipeline["grad_partitioned"]


def test_projecting_a_tied_weight_in_a_pipeline_is_refused():
    grid = Grid(1, 1, 2, 1)
    settings = settings_of(grid, params={"target_modules": ["*embed_tokens*", "*q_proj*"]})
    for error in run_ranks(2, start_error, grid, settings, tie_word_embeddings=True):
        assert "a weight that stages of a pipeline share is not projected" in error


def test_sub_groups_that_differ_between_tensor_ranks_are_refused():
    """Three key-value heads on two ranks: shards differ in size, so sub-groups end after different parameters."""
    grid = Grid(1, 2, 1, 3, "autotp")
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    settings = settings_of(grid, zero_optimization={"sub_group_size": 5000})
    for error in run_ranks(2, start_error, grid, settings, **sizes):
        assert "leave zero_optimization.sub_group_size at its default" in error


def test_layers_already_split_by_deepspeed_are_recognized():
    for error in run_ranks(2, already_split):
        assert "bf16 with tensor parallelism at ZeRO 0" in error


def already_split():
    import deepspeed

    model = deepspeed.tp_model_init(dense_model(), tp_size=2, dtype=torch.bfloat16)
    settings = settings_of(Grid(1, 2, 1, 0), dtype="bf16")
    del settings["train_batch_size"]
    return initialize_error(model, settings)


def test_context_parallelism_is_refused():
    assert all("Set context_parallel_size to 1" in error for error in run_ranks(2, with_context_ranks))


def with_context_ranks():
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    return own_initialize_error(dense_model(), settings_of(Grid(2, 1, 1, 1)), mpu=parallel_state)


def test_shards_without_megatron_cores_marks_are_refused():
    for error in run_ranks(2, without_initialization):
        assert "up.weight is a shard but not marked as one" in error


def without_initialization():
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear

    import ds_lowrank
    from ds_lowrank.integration.mpu import make_grid

    mpu = make_grid(2, 1)
    assert make_grid(2, 1).get_tensor_model_parallel_world_size() == 2
    with pytest.raises(ds_lowrank.ConfigError, match="groups already exist"):
        make_grid(1, 2)
    config = ModelParallelConfig(
        tensor_model_parallel_size=2, use_cpu_initialization=True, perform_initialization=False
    )
    layer = ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.xavier_normal_, bias=False)
    model = torch.nn.ModuleDict({"up": layer})
    return own_initialize_error(model, settings_of(Grid(1, 2, 1, 1)), mpu=mpu)


def test_a_stage_without_parameters_stops_every_stage():
    errors = run_ranks(2, more_stages_than_layers)
    assert all("a stage of the pipeline has nothing to train" in error for error in errors)


def more_stages_than_layers():
    from deepspeed.pipe import LayerSpec, PipelineModule
    from torch import nn

    model = PipelineModule([LayerSpec(nn.Linear, 6, 6), LayerSpec(nn.GELU)], num_stages=2, partition_method="uniform")
    return initialize_error(model, settings_of(PIPELINE))


@pytest.mark.parametrize(("ranks", "size"), [(3, 2), (2, 3)])
def test_a_rank_count_that_autotp_does_not_divide_is_refused(ranks, size):
    message = f"{ranks} ranks are not a multiple of tensor-parallel {size}"
    assert all(message in error for error in run_ranks(ranks, with_autotp, size))


def with_autotp(size):
    settings = settings_of(PIPELINE) | {"tensor_parallel": {"autotp_size": size}}
    return initialize_error(dense_model(), settings)


def test_autotp_with_more_ranks_than_key_value_heads_is_refused():
    grid = Grid(1, 4, 1, 1, "autotp")
    for error in run_ranks(4, start_error, grid, settings_of(grid)):
        assert "AutoTP leaves a tensor-parallel rank without any of it" in error


def test_megatrons_grid_without_an_mpu_is_refused():
    for error in run_ranks(2, without_an_mpu):
        assert "Pass mpu=megatron.core.parallel_state" in error


def without_an_mpu():
    from ds_lowrank.integration.mpu import make_grid
    from ds_lowrank.models import llama_parallel

    make_grid(2, 1)
    model = llama_parallel.build(llama_config(), 0, 2, 1)
    return own_initialize_error(model, settings_of(Grid(2, 1, 1, 1)))
