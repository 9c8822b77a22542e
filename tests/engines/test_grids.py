"""The same update on every grid of data x tensor x pipeline ranks, fp32, against one dense process."""

from __future__ import annotations

import pytest

from tests.engines.grids import CROSSED, CUBE, GRIDS, Grid, oracle, run_grid, settings_of, start, train_step
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, max_relative_difference
from tests.engines.trace import norm_of, trace, worst_against_references

STEPS = 8  # refreshes, where there are any, at steps 0 and 4
CASES = [
    *((grid, "GaLore") for grid in [*GRIDS, CUBE]),
    *((grid, method) for method in sorted(set(METHODS) - {"GaLore"}) for grid in CROSSED),
]


@pytest.mark.parametrize(("grid", "method"), CASES, ids=str)
def test_a_grid_lands_on_the_weights_of_one_process(grid, method):
    settings = settings_of(grid, clip=0.5, gas=2, method=method)
    results = run_ranks(grid.world, run_grid, grid, settings, STEPS)
    (first, last), norms = oracle(method, 0.5, STEPS)
    assert max_relative_difference(results[0]["weights"][0], first) < 1e-5
    assert max_relative_difference(results[0]["weights"][1], last) < 1e-4
    # The first gradient is taken at equal weights; later ones differ as much as the weights have drifted.
    assert all(abs(result["norms"][0] / norms[0] - 1) < 1e-6 for result in results)
    assert max(abs(own / whole - 1) for own, whole in zip(results[0]["norms"], norms, strict=True)) < 1e-4
    assert all(result["norms"] == results[0]["norms"] for result in results)
    stages = {tuple(result["names"]): result for result in results}.values()
    assert sum(stage["metrics"]["lowrank/projected_matrices"] for stage in stages) == 14


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.stage], ids=str)
def test_a_grid_stores_moments_and_bases_once(grid):
    results = run_ranks(grid.world, run_grid, grid, settings_of(grid, gas=2), 1)
    (alone,) = run_ranks(1, run_grid, Grid(1, 1, 1, 0), settings_of(Grid(1, 1, 1, 0)), 1)
    assert sum(result["bytes"][0] for result in results) <= 1.02 * alone["bytes"][0]


TIED = [Grid(1, 2, 2, 1), Grid(2, 1, 2, 0), Grid(2, 2, 1, 2), Grid(2, 2, 1, 1, "autotp")]


@pytest.mark.parametrize("grid", TIED, ids=str)
def test_tied_embeddings_land_on_the_weights_of_one_process(grid):
    settings = settings_of(grid, clip=0.5, gas=2)
    results = run_ranks(grid.world, run_grid, grid, settings, STEPS, tie_word_embeddings=True)
    (first, last), norms = oracle("GaLore", 0.5, STEPS, tie_word_embeddings=True)
    assert max_relative_difference(results[0]["weights"][0], first) < 1e-5
    assert max_relative_difference(results[0]["weights"][1], last) < 1e-4
    assert abs(results[0]["norms"][0] / norms[0] - 1) < 1e-6


@pytest.mark.parametrize("grid", [Grid(1, 2, 2, 1), Grid(2, 2, 1, 3)], ids=str)
def test_recomputing_activations_changes_no_weight(grid):
    settings = settings_of(grid, gas=2)
    kept = run_ranks(grid.world, run_grid, grid, settings, 2)
    recomputed = run_ranks(grid.world, run_grid, grid, settings, 2, recompute=True)
    assert max_relative_difference(recomputed[0]["weights"][1], kept[0]["weights"][1]) == 0


@pytest.mark.parametrize(
    ("grid", "changes"),
    [(Grid(1, 2, 1, 0), {"mlp_bias": True}), (Grid(1, 2, 2, 1), {"tie_word_embeddings": True})],
    ids=str,
)
def test_sequence_parallelism_lands_on_the_weights_of_one_process(grid, changes):
    settings = settings_of(grid, clip=0.5, gas=2)
    results = run_ranks(grid.world, run_with_sequence_parallelism, grid, settings, STEPS, **changes)
    (first, last), norms = oracle("GaLore", 0.5, STEPS, **changes)
    assert max_relative_difference(results[0]["weights"][0], first) < 1e-5
    assert max_relative_difference(results[0]["weights"][1], last) < 1e-4
    assert abs(results[0]["norms"][0] / norms[0] - 1) < 1e-6


def run_with_sequence_parallelism(grid, settings, steps, **changes):
    import torch

    # megatron-core's collectives along the sequence make their tensors on this device.
    torch.cuda.current_device = lambda: torch.device("cpu")
    return run_grid(grid, settings, steps, sequence_parallel=True, **changes)


BF16_GRIDS = [
    *(Grid(2, 2, 1, stage) for stage in (1, 2, 3)),
    *(Grid(2, 2, 1, stage, "autotp") for stage in (1, 2, 3)),
    *(Grid(2, 1, 2, stage) for stage in (0, 1)),
    *(Grid(1, 2, 2, stage) for stage in (0, 1)),
]


@pytest.mark.parametrize("grid", BF16_GRIDS, ids=str)
def test_bf16_steps_and_norms_follow_the_presented_gradient(grid):
    traces = run_ranks(grid.world, trace_grid, grid, settings_of(grid, gas=2, dtype="bf16"))
    assert worst_against_references(traces) < 1e-5
    presented = [norm_of(traces, step) for step in range(3)]
    assert all(own["norms"] == pytest.approx(presented, rel=1e-6) for own in traces)
    # Activations of eight bits change the norm by some thousandths, a missing shard by a third.
    _, norms = oracle("GaLore", 0.0, 3)
    assert traces[0]["norms"] == pytest.approx(norms, rel=0.02)


def trace_grid(grid, settings):
    return trace(start(grid, settings), 3, train_step)
