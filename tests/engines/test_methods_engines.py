"""The methods other than GaLore under real DeepSpeed engines, against one dense process, fp32."""

from __future__ import annotations

import functools

import pytest

from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, Oracle, config, max_relative_difference, run_engine
from tests.engines.trace import trace_engine, worst_against_references
from tests.methods import dense

STEPS = 10  # refreshes, where there are any, at steps 0, 4 and 8
OTHERS = sorted(set(METHODS) - {"GaLore"})  # test_parity.py has GaLore
LAYOUTS = [(stage, world) for stage in range(4) for world in (2, 3)]
CLIPPING = {2: 0.0, 3: 0.5}


@functools.cache
def oracle(method, clip):
    dense = Oracle(clip, method=method)
    dense.step(0)
    first = dense.weights()
    for step in range(1, STEPS):
        dense.step(step)
    ranks = {name: rule.rank for name, rule in dense.rules.items() if hasattr(rule, "rank")}
    return first, dense.weights(), ranks


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize(("stage", "world"), LAYOUTS)
def test_every_stage_and_world_matches_reference(stage, world, method):
    clip, gas = CLIPPING[world], 4 if stage % 2 else 1
    settings = config(stage, world, gas=gas, clip=clip, method=method)
    first, last, ranks = oracle(method, clip)
    results = run_ranks(world, run_engine, settings, STEPS)
    for result in results:
        assert max_relative_difference(result["first"], first) < 1e-5
        assert max_relative_difference(result["last"], last) < 1e-4
        assert result["metrics"]["lowrank/projected_matrices"] == 14
        assert result["matrices"] == results[0]["matrices"]
    if method == "AdaRankGrad":
        assert {name: found["rank"] for name, found in results[0]["matrices"].items()} == ranks
        assert len(set(ranks.values())) > 1, "all matrices have one rank: the test tests nothing"
    if stage and world > 1:
        assert any(result["straddles"] for result in results), "no boundary lies inside a row: the test tests nothing"


WRAPPERS = [(0, "bf16"), (1, "bf16_fp32_accumulation"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize(("stage", "dtype"), WRAPPERS)
def test_every_bf16_wrapper_steps_on_the_presented_gradient(stage, dtype, method):
    dense(method)  # says what to add if it has none
    traces = run_ranks(2, trace_engine, config(stage, 2, dtype, gas=2, clip=0.5, method=method), 6)
    assert all(trace["metrics"]["lowrank/projected_matrices"] == 14 for trace in traces)
    assert worst_against_references(traces, method=method) < 1e-5
