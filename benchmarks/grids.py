"""Grids of data x tensor x pipeline ranks against one process: weights, gradient norms, bytes of state.

python -m benchmarks.grids

Runs the tests' own scenario on real engines, one to eight gloo ranks, in fp32: every method on every grid. Needs the
``dev`` and ``megatron`` extras.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import Numbers, options, report
from tests.engines.grids import CROSSED, CUBE, GRIDS, Grid, oracle, run_grid, settings_of
from tests.engines.pool import run_ranks
from tests.engines.scenario import METHODS, max_relative_difference

STEPS, CLIP = 8, 0.5


def compare(grid: Grid, method: str, alone: int) -> dict[str, Any]:
    """Return the row of one method on one grid.

    Args:
        grid: Degrees of parallelism and the ZeRO stage.
        method: The method's name.
        alone: Bytes of moments and bases in one process.
    """
    results = run_ranks(grid.world, run_grid, grid, settings_of(grid, clip=CLIP, gas=2, method=method), STEPS)
    (first, last), norms = oracle(method, CLIP, STEPS)
    # At ZeRO 0 every data-parallel rank has a copy of the whole state.
    copies = grid.data if grid.stage == 0 else 1
    return {
        "grid": str(grid),
        "method": method,
        "one step": max_relative_difference(results[0]["weights"][0], first),
        "eight steps": max_relative_difference(results[0]["weights"][1], last),
        "first norm": abs(results[0]["norms"][0] / norms[0] - 1),
        "state over one process's": sum(result["bytes"][0] for result in results) / copies / alone,
    }


def main() -> None:
    """Measure and report."""
    arguments = options(__doc__).parse_args()
    methods = ["GaLore"] if arguments.quick else ["GaLore", *sorted(set(METHODS) - {"GaLore"})]
    single = Grid(1, 1, 1, 0)
    rows: Numbers = []
    for method in methods:
        (result,) = run_ranks(1, run_grid, single, settings_of(single, clip=CLIP, gas=2, method=method), STEPS)
        grids = CROSSED[:1] if arguments.quick else [*GRIDS, CUBE]
        rows += [compare(grid, method, result["bytes"][0]) for grid in grids]
    report(rows, arguments)


if __name__ == "__main__":
    main()
