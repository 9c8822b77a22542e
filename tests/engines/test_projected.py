"""Projected reduction and accumulation under real DeepSpeed engines, against one dense process of the summed gradient."""

from __future__ import annotations

import functools

import pytest

from tests.engines.pool import run_ranks
from tests.engines.scenario import Oracle, config, max_relative_difference, run_engine

STEPS = 10  # refreshes, where there are any, at steps 0, 4 and 8
EXACT = ["AdaRankGrad", "GaLore", "GradNormLoRP", "Lorenza", "VLoRP"]
LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 4), (3, 1), (4, 1)]


@functools.cache
def oracle(method):
    dense = Oracle(method=method)
    dense.step(0)
    first = dense.weights()
    for step in range(1, STEPS):
        dense.step(step)
    return first, dense.weights()


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(("world", "gas"), LAYOUTS)
def test_every_world_and_accumulation_matches_one_process(world, gas, method):
    settings = config(0, world, gas=gas, method=method, params={"reduction": "projected"})
    first, last = oracle(method)
    results = run_ranks(world, run_engine, settings, STEPS)
    for result in results:
        assert max_relative_difference(result["first"], first) < 1e-5
        assert max_relative_difference(result["last"], last) < 1e-4
        assert result["metrics"]["lowrank/projected_matrices"] == 14
        assert result["wrapper"] == method
