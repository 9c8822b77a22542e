"""Real DeepSpeed engines against one dense process, fp32."""

from __future__ import annotations

import functools

import pytest

from tests.engines.pool import run_ranks
from tests.engines.scenario import Oracle, config, max_relative_difference, run_engine

STEPS = 10  # refreshes at steps 0, 4 and 8


@functools.cache
def oracle(clip):
    dense = Oracle(clip)
    dense.step(0)
    first = dense.weights()
    for step in range(1, STEPS):
        dense.step(step)
    return first, dense.weights()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("gas", [1, 4])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_galore_lands_on_the_weights_of_one_process_on_every_stage(stage, world, gas, clip):
    results = run_ranks(world, run_engine, config(stage, world, gas=gas, clip=clip), STEPS)
    first, last = oracle(clip)
    for result in results:
        assert max_relative_difference(result["first"], first) < 1e-5
        assert max_relative_difference(result["last"], last) < 1e-4
        assert result["metrics"]["lowrank/projected_matrices"] == 14
    if stage and world > 1:
        assert any(result["straddles"] for result in results), "no boundary lies inside a row: the test tests nothing"
