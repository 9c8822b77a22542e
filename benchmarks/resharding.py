"""Checkpoints that are opened on another grid: random pairs of grids, every logical row compared bit for bit.

python -m benchmarks.resharding --seed 16

200 pairs of (source grid, target grid, method, dtype of the state): 60 through real DeepSpeed engines on gloo ranks,
140 in a simulated world, where ranks are cut at random and states are filled with random numbers. Then, in fp32, the
losses of the ten steps after a move against those of the run that never stopped. It runs the tests' own scenarios and
needs the ``dev`` extra. The exit code says whether everything was equal.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import Numbers, options, report
from ds_lowrank.methods import METHODS
from tests.engines import moves as of_engines
from tests.simulated import moves as simulated

ENGINES, SIMULATED, CURVES = 60, 140, 24
BOUND = 1e-5
"""The largest relative difference of a loss. In fp32 only sums are taken in another order."""
drawn: Callable[..., list[Any]] = of_engines.drawn
rows_are_equal: Callable[..., None] = of_engines.rows_are_equal
curves: Callable[..., tuple[list[float], list[float]]] = of_engines.curves
drawn_move: Callable[..., Any] = simulated.drawn_move
tried: Callable[..., dict[str, int]] = simulated.tried
"""The tests' own helpers."""


class Trials:
    """Counts what was tried and what differed.

    Attributes:
        failed: a line for each pair that differed.
        seen: how often each method, dtype and kind of grid occurred.
    """

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.seen: Counter[str] = Counter()

    @contextmanager
    def trial(self, name: str, *features: str) -> Iterator[Path]:
        """A folder for one trial; an assertion that fails in it is recorded.

        Args:
            name: of the trial.
            features: what it has, to be counted.
        """
        self.seen.update(features)
        with tempfile.TemporaryDirectory(prefix="resharding") as folder:
            try:
                yield Path(folder)
            except AssertionError as error:
                lines = str(error).strip().splitlines() or ["differs"]
                self.failed.append(f"{name}: {lines[-1]}")
                print(self.failed[-1], flush=True)


def in_engines(trials: Trials, count: int, seed: int) -> None:
    """Save and load with real engines.

    Args:
        trials: counts.
        count: of pairs.
        seed: of the draws.
    """
    for move in drawn(count, seed):
        with trials.trial(str(move), *_features(move)) as folder:
            rows_are_equal(move, folder)


def in_simulated_worlds(trials: Trials, count: int, seed: int) -> None:
    """Save and load with simulated ranks.

    Args:
        trials: counts.
        count: of pairs.
        seed: of the draws.
    """
    draw, names = random.Random(seed), sorted(METHODS)
    for number in range(count):
        move = drawn_move(draw, names[number % len(names)])
        worlds = (move.source, move.target)
        features = {move.method, *(f"simulated, {world.cut}" for world in worlds)}
        features |= {f"simulated, {world.layers}" for world in worlds if world.tensor > 1}
        features.add("another state_dtype" if move.saved_as != move.loaded_as else move.saved_as)
        with trials.trial(str(move), *features) as folder:
            sizes = tried(move, folder)
            assert sizes["files"] - sizes["headers"] == sizes["held"], "something was written twice"


def largest_difference(trials: Trials, count: int, seed: int) -> float:
    """The largest relative difference of a loss in the ten steps after a move.

    Args:
        trials: counts.
        count: of moves.
        seed: of the draws.
    """
    largest = 0.0
    for move in drawn(count, seed, fp32=True):
        with trials.trial(str(move), *_features(move)) as folder:
            stayed, moved = curves(move, folder)
            found = max(abs(a / b - 1) for a, b in zip(moved, stayed, strict=True))
            largest = max(largest, found)
            assert found <= BOUND, f"a loss differs by {found:.1e}"
    return largest


def _features(move: Any) -> set[str]:
    places = (move.source, move.target)
    found = {move.method, move.precision, *(f"ZeRO {place.grid.stage}" for place in places)}
    found.add("another state_dtype" if len({place.state_dtype for place in places}) > 1 else places[0].state_dtype)
    found |= {"tensor parallelism" for place in places if place.grid.tensor > 1}
    found |= {"AutoTP" for place in places if place.grid.layers == "autotp"}
    found |= {"pipeline" for place in places if place.grid.pipeline > 1}
    found |= {"projected reduction" for place in places if place.projected}
    found |= {"8 ranks" for place in places if place.grid.world == 8}
    return found | ({"tied"} if move.tied else set())


def measure(arguments: argparse.Namespace) -> tuple[Numbers, Numbers, bool]:
    """Try everything; a row for each part, how often everything occurred, and whether all was equal."""
    quick, seed = arguments.quick, arguments.seed
    parts: dict[str, tuple[int, Callable[[Trials, int, int], float | None]]] = {
        "rows, real engines": (2 if quick else ENGINES, in_engines),
        "rows, simulated ranks": (7 if quick else SIMULATED, in_simulated_worlds),
        "losses of ten steps, real engines": (1 if quick else CURVES, largest_difference),
    }
    rows: Numbers = []
    occurred: Counter[str] = Counter()
    for name, (count, part) in parts.items():
        trials, started = Trials(), time.perf_counter()
        found = part(trials, count, seed)
        rows.append(
            {
                "what": name,
                "pairs": count,
                "differ": len(trials.failed),
                "largest difference of a loss": found,
                "seconds": time.perf_counter() - started,
            }
        )
        occurred += trials.seen
    counts = [{"feature": feature, "pairs": count} for feature, count in sorted(occurred.items())]
    return rows, counts, not any(row["differ"] for row in rows)


def main() -> int:
    """Measure and report."""
    arguments = options(__doc__).parse_args()
    rows, occurred, all_equal = measure(arguments)
    report(rows, arguments, occurred=occurred)
    return int(not all_equal)


if __name__ == "__main__":
    sys.exit(main())
