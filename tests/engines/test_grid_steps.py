"""Steps of a grid: LORENZA's ascent and restore, a NaN on one stage, a resumed run, calls that are not allowed."""

from __future__ import annotations

import pytest
import torch

from tests.engines.grids import (
    PIPELINE,
    Grid,
    GridOracle,
    dense_model,
    run_grid,
    settings_of,
    start,
    tokens,
    train_and_gather,
    train_step,
)
from tests.engines.pool import run_ranks
from tests.engines.scenario import max_relative_difference


def test_a_pipeline_refuses_every_call_other_than_train_batch():
    for errors in run_ranks(2, misuse_a_pipeline):
        assert "call ds_lowrank.train_batch" in errors[0]
        assert "got 1 micro-batches, gradient_accumulation_steps is 2" in errors[1]
        assert "with a PipelineEngine ds_lowrank.train_batch" in errors[2]


def misuse_a_pipeline():
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
def test_an_ascent_restores_every_bit_of_the_weights(grid, dtype):
    settings = settings_of(grid, gas=2, dtype=dtype, method="Lorenza", params={"lr": 0.0})
    for moved, before, after in run_ranks(grid.world, ascend_without_a_learning_rate, grid, settings):
        assert moved > 0.4  # the radius is 0.5; in bf16 some of it is lost to rounding
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def ascend_without_a_learning_rate(grid, settings):
    engine = start(grid, settings)
    train_step(engine, 0)  # finds the first subspace
    before = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]
    train_step(engine, 1)
    after = [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]
    return engine.basic_optimizer.metrics()["lowrank/perturbation_norm"], before, after


@pytest.mark.parametrize(("grid", "clip"), [(Grid(1, 1, 2, 0), 0.0), (Grid(1, 2, 2, 0), 0.5), (Grid(2, 1, 2, 1), 0.0)])
def test_every_stage_skips_a_step_with_a_nan_on_one_stage(grid, clip):
    dense = GridOracle(clip, dense_model())
    for step in (0, 2):
        dense.step(step)
    results = run_ranks(grid.world, train_with_a_nan_on_the_last_stage, grid, settings_of(grid, clip=clip))
    assert max_relative_difference(results[0], dense.weights()) < 1e-4


def train_with_a_nan_on_the_last_stage(grid, settings):
    from ds_lowrank.checkpoint.gather import whole_weights

    engine = start(grid, settings)
    poisoned = []
    if engine.is_last_stage():
        # The hook changes this gradient only, not what the previous stage receives.
        norm = next(p for name, p in engine.module.named_parameters() if name == "3.weight")
        norm.register_hook(lambda gradient: gradient * float("nan") if poisoned else gradient)
    for step in range(3):
        poisoned[:] = [step] if step == 1 else []
        train_step(engine, step)
    return whole_weights(engine)


RESUMED = [
    *(Grid(2, 2, 1, stage) for stage in (0, 2, 3)),
    Grid(1, 2, 2, 0),
    Grid(2, 1, 2, 1),
    Grid(2, 2, 1, 1, "autotp"),
    Grid(1, 2, 1, 3, "autotp"),
]


@pytest.mark.parametrize("grid", RESUMED, ids=str)
def test_a_resumed_grid_lands_on_the_same_bits(grid, tmp_path):
    settings = settings_of(grid, gas=2)
    whole = run_ranks(grid.world, run_grid, grid, settings, 5)
    run_ranks(grid.world, save_after_three, grid, settings, tmp_path)
    resumed = run_ranks(grid.world, resume_for_two, grid, settings, tmp_path)
    assert max_relative_difference(resumed[0], whole[0]["weights"][1]) == 0


def save_after_three(grid, settings, directory):
    engine = start(grid, settings)
    for step in range(3):
        train_step(engine, step)
    engine.save_checkpoint(str(directory), tag="three")


def resume_for_two(grid, settings, directory):
    engine = start(grid, settings)
    engine.load_checkpoint(str(directory), tag="three")
    return train_and_gather(engine, (3, 4))
