"""What must hold on a grid beside the update: refusals on every rank, one decision everywhere, resume, local mode."""

import pytest
import torch

from ds_lowrank.reference import DENSE
from tests.engines.grids import Grid, GridOracle, dense_model, run_grid, settings_of, start, tokens, train_step
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, worst

PIPELINE = Grid(1, 1, 2, 0)


def message_of(attempt):
    """What it says on this rank where it is refused, here or on another."""
    from ds_lowrank.collectives import RemoteError

    try:
        attempt()
    except (ValueError, RemoteError) as error:
        return str(error)
    return ""


def error_of(grid, settings, **changes):
    return message_of(lambda: start(grid, settings, **changes))


def error_of_model(model, settings, **given):
    import ds_lowrank

    return message_of(lambda: ds_lowrank.initialize(model=model, config=settings, **given))


def own_error_of_model(model, settings, **given):
    """For what every rank must find by itself."""
    import ds_lowrank

    try:
        ds_lowrank.initialize(model=model, config=settings, **given)
    except ds_lowrank.ConfigError as error:
        return str(error)
    return ""


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
def test_what_cannot_be_honoured_stops_at_start_on_every_rank(grid, changes, message):
    for error in run_ranks(grid.world, error_of, grid, settings_of(grid, **changes)):
        assert message in error


def test_a_pattern_may_match_on_one_stage_only():
    settings = settings_of(PIPELINE, params={"exclude_modules": ["*layers.1.mlp*"]})
    results = run_ranks(2, run_grid, PIPELINE, settings, 1)
    assert [result["metrics"]["lowrank/projected_matrices"] for result in results] == [7, 4]


def test_a_misfit_on_one_stage_stops_both():
    errors = run_ranks(2, misfit_on_the_last_stage)
    assert "7 x 7: granularity 3 does not fit" in errors[1]
    assert "rank 1" in errors[0] and "7 x 7: granularity 3 does not fit" in errors[0]


def misfit_on_the_last_stage():
    from deepspeed.pipe import LayerSpec, PipelineModule
    from torch import nn

    layers = [LayerSpec(nn.Linear, 6, 6), LayerSpec(nn.Linear, 6, 7), LayerSpec(nn.Linear, 7, 7)]
    model = PipelineModule(layers, num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    settings = settings_of(PIPELINE, method="VLoRP", params={"granularity": 3, "exclude_modules": ["1.weight"]})
    return error_of_model(model, settings)


def test_autotp_goes_with_no_other_grid():
    for error in run_ranks(2, error_of_autotp_in_a_pipeline):
        assert "tensor_parallel.autotp_size creates its own grid" in error


def error_of_autotp_in_a_pipeline():
    return error_of(PIPELINE, settings_of(PIPELINE) | {"tensor_parallel": {"autotp_size": 2}})


def test_parallel_state_will_do_for_a_dense_optimizer_too():
    assert run_ranks(2, dense_with_parallel_state) == [1, 1]


def dense_with_parallel_state():
    from megatron.core import parallel_state

    import ds_lowrank
    from ds_lowrank.models import llama_parallel
    from tests.engines.grids import llama_config

    parallel_state.initialize_model_parallel(2)
    model = llama_parallel.build(llama_config(), 0, 2, 1)
    settings = settings_of(Grid(1, 2, 1, 1))
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine, *_ = ds_lowrank.initialize(
        model=model, model_parameters=model.parameters(), config=settings, mpu=parallel_state
    )
    train_step(engine, 0)
    return engine.global_steps


def plain_pipeline():
    """6 x 8 on one stage, 8 x 6 on the other."""
    from deepspeed.pipe import LayerSpec, PipelineModule
    from torch import nn

    layers = [LayerSpec(nn.Linear, 6, 8), LayerSpec(nn.Linear, 8, 6, bias=False)]
    return PipelineModule(layers, num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform")


def test_groups_that_one_stage_lacks_are_refused_where_deepspeed_would_wait():
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
    error = own_error_of_model(model, settings_of(Grid(1, 1, 2, stage)), model_parameters=groups)
    return error.partition(" that are not empty")[0]


def test_what_one_stage_alone_can_see_stops_both():
    errors = run_ranks(2, experts_on_the_first_stage)
    assert all("expert parallelism is not supported yet" in error for error in errors)


def experts_on_the_first_stage():
    model = plain_pipeline()
    for name, parameter in model.named_parameters():
        parameter.allreduce = not name.startswith("0.")
    return error_of_model(model, settings_of(PIPELINE))


def test_a_client_s_pattern_may_match_on_one_stage_only():
    assert run_ranks(2, client_optimizer, ["1.weight"]) == [1, 0]
    assert all("'nothing' matches no parameter" in error for error in run_ranks(2, client_optimizer, ["nothing"]))


def client_optimizer(excluded):
    """How many matrices it projects, or the error."""
    import ds_lowrank

    model = plain_pipeline()
    optimizer = ds_lowrank.GaLore(model.named_parameters(), rank=2, exclude_modules=excluded)
    settings = settings_of(PIPELINE)
    del settings["optimizer"]
    error = own_error_of_model(model, settings, optimizer=optimizer)
    return error or sum(slot.is_projected for slot in optimizer.slots)


def test_one_stage_with_sequence_parallel_layers_decides_for_both():
    assert run_ranks(2, partitioned_activations) == [(False, False)] * 2


def partitioned_activations():
    from ds_lowrank.integration.stages import with_whole_activations
    from ds_lowrank.placement.grid import grid_of

    model = plain_pipeline()
    for name, module in model.named_modules():
        module.sequence_parallel = name == "1"
    pipeline = with_whole_activations(model, {}, grid_of(model.mpu()))["pipeline"]
    return pipeline["pipe_partitioned"], pipeline["grad_partitioned"]


def test_a_tied_weight_is_not_projected_in_a_pipeline():
    grid = Grid(1, 1, 2, 1)
    settings = settings_of(grid, params={"target_modules": ["*embed_tokens*", "*q_proj*"]})
    for error in run_ranks(2, error_of, grid, settings, tie_word_embeddings=True):
        assert "a weight that stages of a pipeline share is not projected" in error


def test_sub_groups_that_differ_between_tensor_ranks_are_refused():
    """Three key-value heads on two ranks: shards of other sizes, cut after other parameters."""
    grid = Grid(1, 2, 1, 3, "autotp")
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    settings = settings_of(grid, zero_optimization={"sub_group_size": 5000})
    for error in run_ranks(2, error_of, grid, settings, **sizes):
        assert "leave zero_optimization.sub_group_size at its default" in error


def test_layers_that_deepspeed_splits_beforehand_are_seen():
    for error in run_ranks(2, split_beforehand):
        assert "bf16 with tensor parallelism at ZeRO 0" in error


def split_beforehand():
    import deepspeed

    model = deepspeed.tp_model_init(dense_model(), tp_size=2, dtype=torch.bfloat16)
    settings = settings_of(Grid(1, 2, 1, 0), dtype="bf16")
    del settings["train_batch_size"]
    return error_of_model(model, settings)


def test_context_parallelism_is_refused():
    assert all("Set context_parallel_size to 1" in error for error in run_ranks(2, with_context_ranks))


def with_context_ranks():
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    return own_error_of_model(dense_model(), settings_of(Grid(2, 1, 1, 1)), mpu=parallel_state)


def test_shards_that_megatron_core_has_not_marked_are_refused():
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
    return own_error_of_model(model, settings_of(Grid(1, 2, 1, 1)), mpu=mpu)


def test_a_stage_without_parameters_stops_all():
    errors = run_ranks(2, more_stages_than_layers)
    assert all("a stage of the pipeline has nothing to train" in error for error in errors)


def more_stages_than_layers():
    from deepspeed.pipe import LayerSpec, PipelineModule
    from torch import nn

    model = PipelineModule([LayerSpec(nn.Linear, 6, 6), LayerSpec(nn.GELU)], num_stages=2, partition_method="uniform")
    return error_of_model(model, settings_of(PIPELINE))


@pytest.mark.parametrize(("ranks", "size"), [(3, 2), (2, 3)])
def test_ranks_that_autotp_does_not_divide(ranks, size):
    message = f"{ranks} ranks are not a multiple of tensor-parallel {size}"
    assert all(message in error for error in run_ranks(ranks, with_autotp, size))


def with_autotp(size):
    settings = settings_of(PIPELINE) | {"tensor_parallel": {"autotp_size": size}}
    return error_of_model(dense_model(), settings)


def test_deepspeed_must_be_told_of_megatrons_grid():
    for error in run_ranks(2, without_an_mpu):
        assert "Pass mpu=megatron.core.parallel_state" in error


def without_an_mpu():
    from ds_lowrank.integration.mpu import make_grid
    from ds_lowrank.models import llama_parallel
    from tests.engines.grids import llama_config

    make_grid(2, 1)
    model = llama_parallel.build(llama_config(), 0, 2, 1)
    return own_error_of_model(model, settings_of(Grid(2, 1, 1, 1)))


def test_megatrons_own_parallel_state_will_do_as_an_mpu():
    grid = Grid(1, 2, 1, 1)
    expected = run_ranks(2, run_grid, grid, settings_of(grid), 2)
    assert worst(run_ranks(2, with_parallel_state)[0], expected[0]["weights"][1]) == 0


def with_parallel_state():
    from megatron.core import parallel_state

    import ds_lowrank
    from ds_lowrank.checkpoint.gather import whole_weights
    from ds_lowrank.models import llama_parallel
    from tests.engines.grids import llama_config

    parallel_state.initialize_model_parallel(2)
    model = llama_parallel.build(llama_config(), 0, 2, 1)
    engine, *_ = ds_lowrank.initialize(model=model, config=settings_of(Grid(1, 2, 1, 1)), mpu=parallel_state)
    for step in range(2):
        train_step(engine, step)
    return whole_weights(engine)


def test_deepspeed_and_megatron_core_count_the_ranks_alike():
    found = run_ranks(8, groups_of_both)
    assert [own for own, _ in found] == [megatrons for _, megatrons in found]
    assert found[5][0] == [[4, 5], [5, 7], [1, 5]]  # tensor, data, pipeline


def groups_of_both():
    import torch.distributed as dist
    from megatron.core import parallel_state

    from ds_lowrank.integration.mpu import make_grid
    from ds_lowrank.models import llama_parallel
    from tests.engines.grids import llama_config

    make_grid(2, 2)
    ours = llama_parallel.build(llama_config(), 0, 2, 2).mpu()
    own = (ours.get_slice_parallel_group(), ours.get_data_parallel_group(), ours.get_pipe_parallel_group())
    megatrons = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    return tuple([dist.get_process_group_ranks(group) for group in groups] for groups in (own, megatrons))


def test_engines_one_after_the_other_share_their_group():
    """Communicators of NCCL are not free, and nobody destroys them."""
    assert run_ranks(4, joined_twice) == [([0, 1, 2, 3], True)] * 4


def joined_twice():
    import torch.distributed as dist

    from ds_lowrank.integration.mpu import make_grid
    from ds_lowrank.placement.grid import joined

    mpu = make_grid(2, 1)
    first, second = (joined(mpu.get_data_parallel_group(), mpu.get_tensor_model_parallel_group()) for _ in range(2))
    return dist.get_process_group_ranks(first), first is second


def test_a_pipeline_is_stepped_by_train_batch():
    for errors in run_ranks(2, misused):
        assert "call ds_lowrank.train_batch" in errors[0]
        assert "got 1 micro-batches, gradient_accumulation_steps is 2" in errors[1]
        assert "with a PipelineEngine ds_lowrank.train_batch" in errors[2]


def misused():
    import ds_lowrank

    engine = start(PIPELINE, settings_of(PIPELINE, gas=2, method="Lorenza"))
    micro = tokens(0)[:12]
    errors = []
    for attempt in (
        lambda: ds_lowrank.forward_backward(engine, lambda: None),
        lambda: ds_lowrank.train_batch(engine, [(micro, micro)]),
        lambda: engine.train_batch(iter([(micro, micro)] * 2)),
    ):
        try:
            attempt()
            errors.append("")
        except (ValueError, RuntimeError) as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("grid", [Grid(1, 2, 2, 1), Grid(2, 2, 1, 3)], ids=str)
def test_every_bit_is_back_after_a_climb(grid, dtype):
    settings = settings_of(grid, gas=2, dtype=dtype, method="Lorenza", params={"lr": 0.0})
    for moved, before, after in run_ranks(grid.world, climb_without_a_rate, grid, settings):
        assert moved > 0.4  # the radius is 0.5; in bf16 some of it is lost to rounding
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def climb_without_a_rate(grid, settings):
    engine = start(grid, settings)
    train_step(engine, 0)  # finds the first subspace
    held = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]
    train_step(engine, 1)
    after = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]
    return engine.basic_optimizer.metrics()["lowrank/perturbation_norm"], held, after


@pytest.mark.parametrize(("grid", "clip"), [(Grid(1, 1, 2, 0), 0.0), (Grid(1, 2, 2, 0), 0.5), (Grid(2, 1, 2, 1), 0.0)])
def test_a_nan_on_one_stage_is_skipped_by_all(grid, clip):
    dense = GridOracle(clip, dense_model())
    for step in (0, 2):
        dense.step(step)
    results = run_ranks(grid.world, train_with_a_nan_on_the_last_stage, grid, settings_of(grid, clip=clip))
    assert worst(results[0], dense.weights()) < 1e-4


def train_with_a_nan_on_the_last_stage(grid, settings):
    from ds_lowrank.checkpoint.gather import whole_weights

    engine = start(grid, settings)
    poisoned = []
    if engine.is_last_stage():
        # After everything that the stage before gets from this one.
        norm = next(p for name, p in engine.module.named_parameters() if name == "3.weight")
        norm.register_hook(lambda gradient: gradient * float("nan") if poisoned else gradient)
    for step in range(3):
        poisoned[:] = [step] if step == 1 else []
        train_step(engine, step)
    return whole_weights(engine)


RESUMED = [Grid(2, 2, 1, 0), Grid(2, 2, 1, 2), Grid(2, 2, 1, 3), Grid(1, 2, 2, 0), Grid(2, 1, 2, 1)]
RESUMED += [Grid(2, 2, 1, 1, "autotp"), Grid(1, 2, 1, 3, "autotp")]


@pytest.mark.parametrize("grid", RESUMED, ids=str)
def test_a_resumed_grid_lands_on_the_same_bits(grid, tmp_path):
    settings = settings_of(grid, gas=2)
    whole = run_ranks(grid.world, run_grid, grid, settings, 5)
    run_ranks(grid.world, save_after_three, grid, settings, tmp_path)
    resumed = run_ranks(grid.world, two_more, grid, settings, tmp_path)
    assert worst(resumed[0], whole[0]["weights"][1]) == 0


def save_after_three(grid, settings, directory):
    engine = start(grid, settings)
    for step in range(3):
        train_step(engine, step)
    engine.save_checkpoint(str(directory), tag="three")


def two_more(grid, settings, directory):
    from ds_lowrank.checkpoint.gather import whole_weights

    engine = start(grid, settings)
    engine.load_checkpoint(str(directory), tag="three")
    for step in (3, 4):
        train_step(engine, step)
    return whole_weights(engine)


def test_the_role_table_shows_all_stages_and_names_what_is_held_twice():
    grid = Grid(1, 2, 2, 1)
    texts = run_ranks(4, role_table_of, grid, settings_of(grid), tie_word_embeddings=True)
    assert texts[1:] == ["", "", ""]
    table = texts[0]
    assert "14 of 21 parameters are projected" in table  # the tied embedding is on both stages
    for line, text in (
        ("model.layers.*.self_attn.q_proj.weight", "2      projected "),
        ("model.norm.weight", "AdamW (1-D), replicated on 2 tensor-parallel ranks"),
        ("model.embed_tokens.weight", "AdamW (embedding), tied: a copy on this stage"),
    ):
        assert any(row.startswith(line) and text in row for row in table.splitlines()), table
    assert "State over 4 ranks" in table and "are copies on other tensor-parallel ranks" in table


def role_table_of(grid, settings, **changes):
    import io
    import logging

    log, text = logging.getLogger("ds_lowrank"), io.StringIO()
    logging.disable(logging.NOTSET)
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler(text))
    start(grid, settings, **changes)
    return text.getvalue()


class ShardOracle(GridOracle):
    """Every tensor-parallel rank's shard is a matrix of its own."""

    COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

    def __init__(self, ranks, method):
        super().__init__(0.0, dense_model(), method=method)
        self.ranks, self.dims = ranks, {}
        for name, parameter in self.model.named_parameters():
            if type(self.rules[name]) is DENSE[method]:
                self.dims[name] = 0 if name.split(".")[-2] in self.COLUMN else 1
                del self.rules[name]
                self.rules |= {
                    shard: DENSE[method](part, name=shard, **METHODS[method])
                    for shard, part in self.shards(name, parameter.data)
                }

    def shards(self, name, whole):
        return [(f"{name}@tensor{rank}", part) for rank, part in enumerate(whole.chunk(self.ranks, self.dims[name]))]

    def gradients(self, step):
        found = {}
        for name, gradient in super().gradients(step).items():
            found |= dict(self.shards(name, gradient)) if name in self.dims else {name: gradient}
        return found


LOCAL = [
    (Grid(1, 2, 1, 0), "GaLore"),
    (Grid(2, 2, 1, 2), "AdaRankGrad"),  # shards refresh in different steps
    (Grid(1, 2, 2, 1), "Lorenza"),
    (Grid(2, 2, 1, 3, "autotp"), "GaLore"),
]


@pytest.mark.parametrize(("grid", "method"), LOCAL, ids=str)
def test_a_local_projection_is_that_of_each_shard_alone(grid, method):
    dense = ShardOracle(2, method)
    for step in range(6):
        dense.step(step)
    settings = settings_of(grid, method=method, params={"tensor_parallel_projection": "local"})
    results = run_ranks(grid.world, run_grid, grid, settings, 6)
    assert worst(results[0]["weights"][1], dense.weights()) < 1e-4
    assert {name for name in results[0]["names"] if "@" in name} >= {"model.layers.0.mlp.up_proj.weight@tensor0"}


def test_register_alone_knows_autotps_layers():
    grid = Grid(2, 2, 1, 1, "autotp")
    expected = run_ranks(4, run_grid, grid, settings_of(grid), 2)
    assert worst(run_ranks(4, with_stock_initialize)[0], expected[0]["weights"][1]) == 0


def with_stock_initialize():
    import deepspeed

    import ds_lowrank
    from ds_lowrank.checkpoint.gather import whole_weights

    ds_lowrank.register()
    model, settings = dense_model(), settings_of(Grid(2, 2, 1, 1), tensor_parallel={"autotp_size": 2})
    del settings["train_batch_size"]
    ds_lowrank.tag_parameters(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    for step in range(2):
        train_step(engine, step)
    return whole_weights(engine)


def test_autotp_at_zero_3_under_zero_init():
    """AutoTP replaces the parameters that zero.Init has partitioned."""
    expected = run_ranks(4, run_grid, Grid(2, 2, 1, 3, "autotp"), settings_of(Grid(2, 2, 1, 3)), 2)
    assert worst(run_ranks(4, under_zero_init)[0], expected[0]["weights"][1]) < 1e-5


def under_zero_init():
    import ds_lowrank
    from ds_lowrank.checkpoint.gather import whole_weights
    from ds_lowrank.models import llama
    from tests.engines.grids import llama_config

    settings = settings_of(Grid(2, 2, 1, 3), tensor_parallel={"autotp_size": 2})
    del settings["train_batch_size"]
    engine, *_ = ds_lowrank.initialize(model=llama.build(llama_config(), 0, settings), config=settings)
    for step in range(2):
        train_step(engine, step)
    return whole_weights(engine)


def test_autotp_with_more_ranks_than_key_value_heads():
    grid = Grid(1, 4, 1, 1, "autotp")
    for error in run_ranks(4, error_of, grid, settings_of(grid)):
        assert "AutoTP leaves a tensor-parallel rank without any of it" in error


def test_the_role_table_counts_the_shards_of_all_tensor_ranks():
    grid = Grid(1, 2, 1, 0)
    tables = [
        run_ranks(2, role_table_of, grid, settings_of(grid, params={"tensor_parallel_projection": projection}))[0]
        for projection in ("logical", "local")
    ]
    assert all("State over 2 ranks" in table for table in tables)
    assert "projected as 2 independent shards" in tables[1]


def test_a_client_optimizer_learns_of_the_pipeline():
    """LORENZA's perturbation has one norm over all stages: the same weights as with an optimizer named in the JSON."""
    for own, named in run_ranks(2, lorenza_in_a_plain_pipeline):
        assert own.keys() == named.keys()
        assert all(torch.equal(own[name], named[name]) for name in own)


def lorenza_in_a_plain_pipeline():
    from deepspeed.pipe import LayerSpec, PipelineModule
    from torch import nn

    import ds_lowrank

    found = []
    for is_client in (True, False):
        torch.manual_seed(0)
        layers = [LayerSpec(nn.Linear, 6, 8), LayerSpec(nn.Linear, 8, 8), LayerSpec(nn.Linear, 8, 6)]
        model = PipelineModule(layers, num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform")
        settings = settings_of(PIPELINE, method="Lorenza", gas=2)
        optimizer = None
        if is_client:
            block = settings.pop("optimizer")
            optimizer = ds_lowrank.Lorenza(model.named_parameters(), **block["params"])
        engine, *_ = ds_lowrank.initialize(model=model, optimizer=optimizer, config=settings)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            batches = [tuple(torch.randn(12, 6, generator=generator) for _ in range(2)) for _ in range(2)]
            ds_lowrank.train_batch(engine, batches)
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return found
