"""Kills at random moments on a random grid; the run is finished on another one, with the same curve."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import tempfile
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.faults.kills import INTERVAL, MOMENTS, STEPS, wait_for_moment
from benchmarks.faults.one_rank import workspace
from benchmarks.faults.programs import Running, run
from benchmarks.faults.trial import Outcome, Trial

TRIALS = 200
TOLERANCE = 1e-5
"""How far a loss may be from that of an undisturbed run on one rank, relative: fp32 sums in another order."""
VICTIMS = ("one rank", "all ranks", "SIGTERM to all")


@dataclass(frozen=True)
class Place:
    """Where a run trains.

    Attributes:
        ranks: how many there are.
        stage: of ZeRO.
        flags: of the grid.
        params: options of the optimizer.
    """

    ranks: int
    stage: int
    flags: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([f"{self.ranks} x ZeRO {self.stage}", *self.flags, *self.params.values()])


TENSOR, PIPELINE = ("--tensor-parallel", "2"), ("--pipeline-parallel", "2")
PLACES = [
    *(Place(ranks, stage) for ranks in (1, 2, 4) for stage in range(4)),
    *(Place(2, stage, TENSOR) for stage in (1, 2)),
    Place(4, 3, TENSOR),
    Place(2, 0, PIPELINE),
    Place(4, 1, PIPELINE),
    *(Place(ranks, 0, params={"reduction": "projected"}) for ranks in (1, 2)),
]


def _command(folder: Path, place: Place) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    params = {"lr": 0.01, "rank": 8, "update_proj_gap": 2, **place.params}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "GaLore", "params": params},
        "zero_optimization": {"stage": place.stage},
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 without it; projected reduction clips another norm
    }
    limits = ("--timeout", "20", "--join-timeout", "10")  # also where a rank is killed before it has joined
    more = ("--save-interval", str(INTERVAL), *limits, "--resume", "--eval-sequences", "0", *place.flags)
    return workspace(folder, STEPS, *more, config=config)


def moved(folder: Path, seed: int, moment: str) -> Outcome:
    """Kill a run once, and finish it somewhere else.

    Args:
        folder: an empty folder.
        seed: of the grids, the victim and the exact moment.
        moment: one of the moments of kills.
    """
    chance = random.Random(seed)
    source, target = chance.sample(PLACES, 2)
    victim = chance.choice(VICTIMS)
    place = folder / "killed"
    running = Running("pretrain", _command(place, source), source.ranks, place)
    wait_for_moment(running, moment, place, chance)
    victims = range(source.ranks) if "all" in victim else [chance.randrange(source.ranks)]
    for rank in victims:
        running.send(signal.SIGTERM if "SIGTERM" in victim else signal.SIGKILL, rank)
    finished = running.finish(60)
    what = f"{source} to {target}, {victim}"
    if finished.hung:
        return Outcome("hang", f"{what}: {finished.err[-300:]}")
    whole = [
        int(path.name.removeprefix("global_step")) for path in (place / "run" / "checkpoints").glob("global_step*")
    ]
    finished = run("pretrain", _command(place, target), target.ranks, place)
    if not finished.succeeded:
        return Outcome("hang" if finished.hung else "cannot go on", f"{what}: {finished.err[-400:]}")
    taken = [int(step) for step in re.findall(rf"step (\d+)/{STEPS}", finished.out)]
    first = max(whole, default=0) + 1
    if taken != list(range(first, STEPS + 1)):
        return Outcome("other result", f"{what}: checkpoints of steps {sorted(whole)}, then steps {taken}")
    return _compare(place, what)


def _compare(place: Path, what: str) -> Outcome:
    wanted, found = _undisturbed(), _losses(place)
    if list(found) != list(wanted):
        return Outcome("other result", f"{what}: records of steps {list(found)}")
    different = [s for s in wanted if not math.isclose(found[s], wanted[s], rel_tol=TOLERANCE)]
    return Outcome("other result", f"{what}: losses of steps {different}") if different else Outcome("same result")


@cache
def _undisturbed() -> dict[int, float]:
    """The losses of a run on one rank that nothing disturbs."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "whole"
        finished = run("pretrain", _command(folder, Place(1, 0)), 1, folder)
        if not finished.succeeded:
            raise ValueError(f"without a fault: {finished.err[-300:]}")
        return _losses(folder)


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def trials() -> list[Trial]:
    """Two hundred kills, a quarter of them during a save."""
    found = []
    for seed in range(TRIALS):
        moment = MOMENTS[seed % len(MOMENTS)]
        run_one = partial(moved, seed=seed, moment=moment)
        found.append(Trial(f"{seed}: {moment}", run_one, compact=seed in (1, 5, 6)))
    return found
