"""A checkpoint is opened on another grid: every logical row is the same, and the run goes on as if it had not moved.

``benchmarks/resharding.py`` tries many more pairs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import grids
from tests.engines.grids import Grid
from tests.engines.moves import Move, Place, curves, rows_are_equal, tensors_of
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, config

ROWS = [
    Move(Place(Grid(3, 1, 1, 3), "int8"), Place(Grid(1, 1, 2, 0), "int8"), "GaLore"),
    Move(Place(Grid(2, 2, 1, 1, "autotp")), Place(Grid(4, 1, 1, 2)), "GaLore", "bf16"),
    Move(Place(Grid(1, 2, 2, 1), "bf16"), Place(Grid(2, 1, 1, 3), "int8"), "GaLore"),
    Move(Place(Grid(2, 1, 1, 0), projected=True), Place(Grid(3, 1, 1, 1)), "GaLore", tied=True),
    Move(Place(Grid(2, 1, 1, 2), "bf16"), Place(Grid(2, 2, 1, 3), "bf16"), "OnlineSubspaceDescent"),
    Move(Place(Grid(1, 1, 2, 1), "int8"), Place(Grid(4, 1, 1, 1), "fp32"), "OnlineSubspaceDescent", tied=True),
    Move(Place(Grid(4, 1, 1, 1), "int8"), Place(Grid(2, 2, 1, 0), "int8"), "VLoRP"),
    Move(Place(Grid(2, 2, 1, 3, "autotp")), Place(Grid(2, 1, 1, 0), projected=True), "VLoRP", "bf16 alone"),
    Move(Place(Grid(1, 2, 1, 2)), Place(Grid(3, 1, 1, 3)), "AdaRankGrad"),
    Move(Place(Grid(2, 1, 2, 0), "bf16"), Place(Grid(1, 2, 1, 1), "bf16"), "AdaRankGrad"),
    Move(Place(Grid(8, 1, 1, 2), "int8"), Place(Grid(1, 1, 1, 0), "int8"), "Apollo"),
    Move(Place(Grid(2, 2, 1, 1), "bf16"), Place(Grid(1, 1, 2, 1), "bf16"), "Apollo", "bf16", tied=True),
    Move(Place(Grid(3, 1, 1, 1), "int8"), Place(Grid(2, 1, 1, 3), "int8"), "GradNormLoRP", "bf16"),
    Move(Place(Grid(1, 2, 2, 0)), Place(Grid(2, 1, 1, 2)), "Lorenza"),
    Move(Place(Grid(2, 2, 1, 2), "int8"), Place(Grid(3, 1, 1, 1), "int8"), "Tandem"),
    Move(Place(Grid(2, 2, 1, 2)), Place(Grid(3, 1, 1, 3)), "Scale"),
    Move(Place(Grid(3, 1, 1, 3), "int8"), Place(Grid(1, 2, 2, 1), "int8"), "Racs"),
    Move(Place(Grid(2, 1, 1, 3), "int8"), Place(Grid(1, 2, 1, 0)), "Fira"),
    Move(Place(Grid(2, 2, 1, 1)), Place(Grid(3, 1, 1, 2), "bf16"), "Frugal", "bf16"),
    Move(Place(Grid(2, 1, 1, 3), "int8"), Place(Grid(1, 2, 1, 1), "int8"), "LDAdam"),
    Move(Place(Grid(2, 1, 1, 3), "bf16"), Place(Grid(1, 2, 1, 1), "bf16"), "LDAdam"),
    Move(Place(Grid(3, 1, 1, 1)), Place(Grid(2, 2, 1, 2)), "SubTrack"),
    Move(Place(Grid(3, 1, 1, 1), "int8"), Place(Grid(2, 1, 1, 3), "int8"), "Sumo"),
    Move(Place(Grid(2, 1, 1, 3), "int8"), Place(Grid(1, 2, 1, 1), "int8"), "Gum"),
    Move(Place(Grid(2, 2, 1, 1), "bf16"), Place(Grid(3, 1, 1, 2), "bf16"), "Gum", "bf16", tied=True),
    Move(Place(Grid(2, 2, 1, 2)), Place(Grid(3, 1, 1, 3)), "Flora"),
    Move(Place(Grid(2, 1, 1, 3), "int8"), Place(Grid(2, 2, 1, 1), "int8"), "Cosmos"),
]
CURVES = [
    Move(Place(Grid(2, 1, 1, 3)), Place(Grid(1, 2, 2, 1)), "GaLore"),
    Move(Place(Grid(1, 2, 1, 1)), Place(Grid(3, 1, 1, 0)), "VLoRP"),
    Move(Place(Grid(2, 1, 1, 0), projected=True), Place(Grid(2, 1, 1, 2)), "AdaRankGrad"),
    Move(Place(Grid(1, 1, 2, 0)), Place(Grid(2, 2, 1, 2, "autotp")), "Lorenza"),
    Move(Place(Grid(3, 1, 1, 2)), Place(Grid(1, 1, 1, 0)), "OnlineSubspaceDescent"),
    Move(Place(Grid(1, 1, 1, 1)), Place(Grid(4, 1, 1, 3)), "GradNormLoRP", tied=True),
]


@pytest.mark.parametrize("move", ROWS, ids=str)
def test_every_logical_row_is_the_same_on_another_grid(move, tmp_path):
    rows_are_equal(move, tmp_path)


@pytest.mark.parametrize("move", CURVES, ids=str)
def test_the_losses_after_a_move_are_those_of_a_run_that_never_stopped(move, tmp_path):
    """In fp32 only sums are taken in another order."""
    for stayed, moved in zip(*curves(move, tmp_path), strict=True):
        assert math.isclose(stayed, moved, rel_tol=1e-5)


def test_every_kind_of_run_moves():
    places = [place for move in ROWS for place in (move.source, move.target)]
    assert {move.method for move in ROWS} == set(METHODS)
    assert {place.grid.stage for place in places} == {0, 1, 2, 3}
    assert {place.grid.layers for place in places} == {"megatron", "autotp"}
    assert max(place.grid.world for place in places) == 8
    assert {move.precision for move in ROWS} == {"fp32", "bf16", "bf16 alone"}


def test_a_copy_that_zero_cuts_elsewhere_on_another_tensor_parallel_rank_is_saved_once(tmp_path):
    """AutoTP splits 101 rows into 51 and 50, so that the embedding, of which both have a copy, is cut in two ways."""
    grid = Grid(4, 2, 1, 1, "autotp")
    trained = run_ranks(grid.world, save_uneven, grid, config(grid.stage, grid.data), str(tmp_path))[0]
    saved = tensors_of(Path(tmp_path) / "there")
    assert torch.equal(saved["model.embed_tokens.weight"], trained)


def save_uneven(grid: Grid, settings: dict[str, Any], directory: str) -> torch.Tensor:
    engine = grids.start(grid, settings, intermediate_size=101, vocab_size=400)
    grids.train_step(engine, 0)
    engine.save_checkpoint(directory, tag="there")
    return engine.module.model.embed_tokens.weight.detach().clone()
