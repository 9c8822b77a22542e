"""A checkpoint is opened on another grid: every logical row is the same, and the run goes on as if it had not moved."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import grids
from tests.engines.grids import Grid
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, config

SAVED_AFTER, STEPS = 3, 13
PLACES = [
    *(Grid(data, 1, 1, stage) for stage in range(4) for data in (1, 2, 3, 4)),
    *(Grid(data, 2, 1, stage) for stage in range(4) for data in (1, 2)),
    *(Grid(2, 2, 1, stage, "autotp") for stage in range(4)),
    *(Grid(data, tensor, 2, stage) for stage in (0, 1) for data, tensor in ((1, 1), (2, 1), (1, 2))),
    Grid(2, 2, 2, 1),
    Grid(8, 1, 1, 2),
    Grid(8, 1, 1, 3),
]
IN_PIPELINES = sorted(set(METHODS))


def settings_of(place: Grid, method: str, params: dict[str, Any], gas: int) -> dict[str, Any]:
    return config(place.stage, place.data, method=method, gas=gas, params=params)


def started(place: Grid, settings: dict[str, Any]) -> Any:
    if place.tensor == place.pipeline == 1:
        import ds_lowrank

        return ds_lowrank.initialize(model=grids.dense_model(), config=settings)[0]
    return grids.start(place, settings)


def mean_loss(engine: Any, step: int) -> float:
    """The loss of one step, over the whole batch."""
    import torch.distributed as dist

    loss = torch.tensor(grids.train_step(engine, step), dtype=torch.float64, device="cpu")
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


def train_and_save(place: Grid, settings: dict[str, Any], directory: str, tag: str) -> list[float]:
    engine = started(place, settings)
    losses = [mean_loss(engine, step) for step in range(SAVED_AFTER)]
    engine.save_checkpoint(directory, tag=tag)
    return losses


def load_and_save(place: Grid, settings: dict[str, Any], directory: str, steps: int) -> list[float]:
    """Open ``there``, save it again as ``here``, and take some more steps."""
    torch.manual_seed(99)
    engine = started(place, settings)
    engine.load_checkpoint(directory, tag="there")
    engine.save_checkpoint(directory, tag="here")
    return [mean_loss(engine, step) for step in range(SAVED_AFTER, SAVED_AFTER + steps)]


def tensors_of(folder: Path) -> Any:
    from ds_lowrank.checkpoint.manifest import read_manifest
    from ds_lowrank.checkpoint.reader import SavedTensors

    names = sorted(name for name in read_manifest(folder).files if name.endswith(".safetensors"))
    with SavedTensors(folder, names) as saved:
        return {key: saved.whole(key) for key in saved}


def check_equal_rows(directory: Path) -> None:
    before, after = tensors_of(directory / "there"), tensors_of(directory / "here")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key


def moves(count: int) -> list[tuple[Grid, Grid, str, str]]:
    draw = random.Random(16)
    found = []
    names = sorted(METHODS)
    for number in range(count):
        source, target = draw.sample(PLACES, 2)
        found.append((source, target, names[number % len(names)], draw.choice(["fp32", "bf16", "int8"])))
    return found


@pytest.mark.parametrize(("source", "target", "method", "state_dtype"), moves(60), ids=str)
def test_every_logical_row_is_the_same_on_another_grid(source, target, method, state_dtype, tmp_path):
    params = {"state_dtype": state_dtype}
    run_ranks(source.world, train_and_save, source, settings_of(source, method, params, 1), str(tmp_path), "there")
    run_ranks(target.world, load_and_save, target, settings_of(target, method, params, 1), str(tmp_path), 0)
    check_equal_rows(tmp_path)


@pytest.mark.parametrize(("source", "target", "method", "state_dtype"), moves(24), ids=str)
def test_the_losses_after_a_move_are_those_of_a_run_that_never_stopped(source, target, method, state_dtype, tmp_path):
    """In fp32 only sums are taken in another order."""
    settings = settings_of(source, method, {}, 1)
    run_ranks(source.world, train_and_save, source, settings, str(tmp_path), "there")
    stayed = run_ranks(source.world, load_and_save, source, settings, str(tmp_path), STEPS - SAVED_AFTER)[0]
    moved_settings = settings_of(target, method, {}, 1)
    moved = run_ranks(target.world, load_and_save, target, moved_settings, str(tmp_path), STEPS - SAVED_AFTER)[0]
    for a, b in zip(stayed, moved, strict=True):
        assert math.isclose(a, b, rel_tol=1e-5), (stayed, moved)
