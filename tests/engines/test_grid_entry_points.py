"""The ways into a grid: any ``mpu``, ``register``, client optimizers, AutoTP under ``zero.Init``; groups of ranks."""

from __future__ import annotations

import torch

from tests.engines.grids import (
    PIPELINE,
    Grid,
    dense_model,
    llama_config,
    own_initialize_error,
    plain_pipeline,
    run_grid,
    settings_of,
    tokens,
    train_and_gather,
)
from tests.engines.pool import run_ranks
from tests.engines.scenario import max_relative_difference
from tests.rows.row import UNDER_ENGINES

ADAMW = {**UNDER_ENGINES, "betas": (0.9, 0.999), "weight_decay": 0.1}


def test_megatrons_parallel_state_works_as_mpu():
    grid = Grid(1, 2, 1, 1)
    expected = run_ranks(2, run_grid, grid, settings_of(grid), 2)
    assert max_relative_difference(run_ranks(2, with_parallel_state)[0], expected[0]["weights"][1]) == 0


def with_parallel_state():
    from megatron.core import parallel_state

    import ds_lowrank
    from ds_lowrank.models import llama_parallel

    parallel_state.initialize_model_parallel(2)
    model = llama_parallel.build(llama_config(), 0, 2, 1)
    engine, *_ = ds_lowrank.initialize(model=model, config=settings_of(Grid(1, 2, 1, 1)), mpu=parallel_state)
    return train_and_gather(engine, range(2))


def test_megatrons_parallel_state_works_as_mpu_for_a_dense_optimizer():
    model = dense_model()
    plain = torch.optim.AdamW(model.parameters(), **ADAMW)
    for step in range(2):
        plain.zero_grad()
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        plain.step()
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert max_relative_difference(run_ranks(2, with_parallel_state_and_adamw)[0], expected) < 1e-5


def with_parallel_state_and_adamw():
    from megatron.core import parallel_state

    import ds_lowrank
    from ds_lowrank.models import llama_parallel

    parallel_state.initialize_model_parallel(2)
    model = llama_parallel.build(llama_config(), 0, 2, 1)
    settings = settings_of(Grid(1, 2, 1, 1))
    settings["optimizer"] = {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}}
    engine, *_ = ds_lowrank.initialize(
        model=model, model_parameters=model.parameters(), config=settings, mpu=parallel_state
    )
    return train_and_gather(engine, range(2))


def test_register_recognizes_autotps_layers():
    grid = Grid(2, 2, 1, 1, "autotp")
    expected = run_ranks(4, run_grid, grid, settings_of(grid), 2)
    assert max_relative_difference(run_ranks(4, with_stock_initialize)[0], expected[0]["weights"][1]) == 0


def with_stock_initialize():
    from deepspeed import initialize

    import ds_lowrank

    ds_lowrank.register()
    model, settings = dense_model(), settings_of(Grid(2, 2, 1, 1), tensor_parallel={"autotp_size": 2})
    del settings["train_batch_size"]
    ds_lowrank.tag_parameters(model)
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=settings)
    return train_and_gather(engine, range(2))


def test_autotp_under_zero_init_lands_on_the_same_weights():
    """AutoTP replaces the parameters that ``zero.Init`` has partitioned."""
    expected = run_ranks(4, run_grid, Grid(2, 2, 1, 3, "autotp"), settings_of(Grid(2, 2, 1, 3)), 2)
    assert max_relative_difference(run_ranks(4, under_zero_init)[0], expected[0]["weights"][1]) < 1e-5


def under_zero_init():
    import ds_lowrank
    from ds_lowrank.models import llama

    settings = settings_of(Grid(2, 2, 1, 3), tensor_parallel={"autotp_size": 2})
    del settings["train_batch_size"]
    engine, *_ = ds_lowrank.initialize(model=llama.build(llama_config(), 0, settings), config=settings)
    return train_and_gather(engine, range(2))


def test_a_pattern_of_a_client_optimizer_may_match_on_one_stage_only():
    assert run_ranks(2, with_a_client_optimizer, ["1.weight"]) == [1, 0]
    assert all(
        "'nothing' matches no parameter" in error for error in run_ranks(2, with_a_client_optimizer, ["nothing"])
    )


def with_a_client_optimizer(excluded):
    """The number of matrices that this stage projects, or the error."""
    import ds_lowrank

    model = plain_pipeline()
    optimizer = ds_lowrank.GaLore(model, rank=2, exclude_modules=excluded)
    settings = settings_of(PIPELINE)
    del settings["optimizer"]
    error = own_initialize_error(model, settings, optimizer=optimizer)
    return error or sum(slot.is_projected for slot in optimizer.slots)


def test_a_client_optimizer_sums_norms_over_the_pipeline():
    """LORENZA's perturbation has one norm over all stages. The reference is the same optimizer, named in the JSON."""
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
            optimizer = ds_lowrank.Lorenza(model, **block["params"])
        engine, *_ = ds_lowrank.initialize(model=model, optimizer=optimizer, config=settings)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            batches = [tuple(torch.randn(12, 6, generator=generator) for _ in range(2)) for _ in range(2)]
            ds_lowrank.train_batch(engine, batches)
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return found


def test_deepspeed_and_megatron_core_order_ranks_alike():
    found = run_ranks(8, groups_of_both)
    assert [own for own, _ in found] == [megatrons for _, megatrons in found]
    assert found[5][0] == [[4, 5], [5, 7], [1, 5]]  # tensor, data, pipeline


def groups_of_both():
    import torch.distributed as dist
    from megatron.core import parallel_state

    from ds_lowrank.integration.mpu import make_grid
    from ds_lowrank.models import llama_parallel

    make_grid(2, 2)
    ours = llama_parallel.build(llama_config(), 0, 2, 2).mpu()
    own = (ours.get_slice_parallel_group(), ours.get_data_parallel_group(), ours.get_pipe_parallel_group())
    megatrons = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    return tuple([dist.get_process_group_ranks(group) for group in groups] for groups in (own, megatrons))


def test_consecutive_engines_share_their_process_group():
    """NCCL communicators take memory, and nothing destroys them."""
    assert run_ranks(4, joined_twice) == [([0, 1, 2, 3], True)] * 4


def joined_twice():
    import torch.distributed as dist

    from ds_lowrank.integration.mpu import make_grid
    from ds_lowrank.placement.grid import joined

    mpu = make_grid(2, 1)
    first, second = (joined(mpu.get_data_parallel_group(), mpu.get_tensor_model_parallel_group()) for _ in range(2))
    return dist.get_process_group_ranks(first), first is second
