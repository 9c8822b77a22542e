"""How far parallel training is from one dense process: the largest differences that the parity tests see.

python -m benchmarks.equality

Runs the tests' own scenarios: real DeepSpeed engines on 1, 2 and 3 gloo ranks, DeepSpeed's wrappers pairwise, and the
simulated world. Needs the ``dev`` extra.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from benchmarks.common import Numbers, options, report
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, Oracle, config, max_relative_difference, run_engine
from tests.engines.test_wrappers import CASES
from tests.engines.test_wrappers import settings_of as untyped_settings_of
from tests.engines.trace import trace_engine, worst_against_references
from tests.methods import of
from tests.simulated import harness

STEPS = 10
settings_of: Callable[..., dict[str, Any]] = untyped_settings_of
even_parts: Callable[..., Any] = harness.even_parts
relative_error: Callable[..., tuple[float, Any]] = harness.relative_error
"""The tests' own helpers and cases, which have no annotations there."""


def engines(method: str, worlds: list[int], stages: list[int]) -> Numbers:
    """Compare engines with one dense process, with and without clipping and with 1 and 4 micro-batches.

    Args:
        method: The method's name.
        worlds: Numbers of ranks.
        stages: ZeRO stages.

    Returns:
        A row for the difference after the first step and one for that after ten.
    """
    largest = {"one step": 0.0, "ten steps": 0.0}
    for clip in (0.0, 0.5):
        oracle = Oracle(clip, method=method)
        weights = []
        for step in range(STEPS):
            oracle.step(step)
            weights.append(oracle.weights())
        for world, stage, gas in product(worlds, stages, (1, 4)):
            result = run_ranks(world, run_engine, config(stage, world, gas=gas, clip=clip, method=method), STEPS)[0]
            largest["one step"] = max(largest["one step"], max_relative_difference(result["first"], weights[0]))
            largest["ten steps"] = max(largest["ten steps"], max_relative_difference(result["last"], weights[-1]))
    return [{"what": f"{method}, engines, {what}", "largest difference": found} for what, found in largest.items()]


def wrappers(cases: list[dict[str, Any]]) -> float:
    """Return the largest difference of any step of any case from the dense method, given the same gradient."""
    largest = 0.0
    for case in cases:
        traces = run_ranks(case["world"], trace_engine, settings_of(case), 6, case["zero_init"])
        largest = max(largest, worst_against_references(traces))
    return largest


def simulated(method: str, ranks: list[int]) -> float:
    """Return the largest difference over all option sets, shapes and numbers of ranks of the simulated tests."""
    return max(
        relative_error(method, shape, even_parts(shape, n), gradients=of(method).gradients_for(shape), **chosen)[0]
        for chosen in of(method).cases
        for shape in of(method).shapes
        for n in ranks
    )


def main() -> None:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods")
    arguments = parser.parse_args()
    worlds, stages = ([2], [2]) if arguments.quick else ([1, 2, 3], [0, 1, 2, 3])
    rows: Numbers = []
    for method in arguments.only:
        rows += engines(method, worlds, stages)
        rows.append({"what": f"{method}, simulated world", "largest difference": simulated(method, [1, 2, 3, 5])})
    if "GaLore" in arguments.only:
        pairs = CASES[:2] if arguments.quick else CASES
        rows.append({"what": "GaLore, wrappers, pairwise", "largest difference": wrappers(pairs)})
    report(rows, arguments)


if __name__ == "__main__":
    main()
