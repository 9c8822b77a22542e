"""The largest differences from one dense process that the parity tests see: how far below their bounds they are.

python benchmarks/equality.py

Runs the tests' own scenarios: real DeepSpeed engines on 1, 2 and 3 gloo ranks, the wrappers pairwise, and the
simulated world. Needs the ``dev`` extra.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import Numbers, options, report

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.engines.pool import run_ranks
from tests.engines.scenario import Oracle, config, run_engine, worst
from tests.engines.test_wrappers import CASES, settings_of
from tests.engines.trace import trace_engine, worst_against_references
from tests.simulated.test_galore import OPTIONS, flat_parts, relative_error

STEPS = 10


def engines(worlds: list[int], stages: list[int]) -> Numbers:
    """After the first step and after ten, for each clipping threshold; 1 and 4 micro-batches."""
    rows: Numbers = []
    for clip in (0.0, 0.5):
        oracle = Oracle(clip)
        weights = []
        for step in range(STEPS):
            oracle.step(step)
            weights.append(oracle.weights())
        results = [
            run_ranks(world, run_engine, config(stage, world, gas=gas, clip=clip), STEPS)[0]
            for world in worlds
            for stage in stages
            for gas in (1, 4)
        ]
        for what, key, truth in (("one step", "first", weights[0]), ("ten steps", "last", weights[-1])):
            largest = max(worst(result[key], truth) for result in results)
            rows.append({"what": f"engines, {what}, clipping {clip}", "largest difference": largest})
    return rows


def wrappers(cases: list[dict[str, Any]]) -> float:
    """Each step of each pairwise case against the dense method of the presented gradient."""
    largest = 0.0
    for case in cases:
        traces = run_ranks(case["world"], trace_engine, settings_of(case), 6, case["zero_init"])
        largest = max(largest, worst_against_references(traces))
    return largest


def simulated(ranks: list[int]) -> float:
    """Every option on every world of the simulated tests."""
    torch.manual_seed(0)
    shapes = [(17, 9), (9, 17), (12, 12)]
    return max(
        relative_error(shape, flat_parts(shape, [shape[0] * shape[1] * i // n + 1 for i in range(1, n)]), **chosen)[0]
        for chosen in OPTIONS
        for shape in shapes
        for n in ranks
    )


def main() -> None:
    arguments = options(__doc__).parse_args()
    worlds, stages = ([2], [2]) if arguments.quick else ([1, 2, 3], [0, 1, 2, 3])
    rows = engines(worlds, stages)
    rows.append({"what": "wrappers, pairwise", "largest difference": wrappers(CASES[:2] if arguments.quick else CASES)})
    rows.append({"what": "simulated world", "largest difference": simulated([1, 2, 3, 5])})
    report(rows, arguments)


if __name__ == "__main__":
    main()
