"""Host time of one rank's ordinary GaLore step in a world of many ranks, and what it costs to plan it. No network.

python -m benchmarks.world_cost

The model is a LLaMA 7B, 224 matrices in 32 layers, with sizes divided by 64 so that there is little arithmetic; beyond
64 ranks by as much less, so that ZeRO 3 leaves a rank whole rows, as it does at 7B. The rank in the middle of the world
runs its real programs, and packs and unpacks what it exchanges; what the others would send is ones, since a matrix
whose gradient were zero everywhere would take another path. One thread, fp32.

All worlds take turns in one process, and each time is a median. *exchange* is the share of packing and unpacking.
*plan* is the time of describing all matrices and of the first step beyond that of a second one; *plan MiB* is how much
a process has grown after both, some MiB of which are the rank's tensors. Each is measured in a process of its own.
*holds* is of how many matrices the rank has elements.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from statistics import median

import psutil
import torch
from torch.multiprocessing import get_context

from benchmarks.common import Numbers, interleaved, medians, options, report
from benchmarks.grid_bytes import step
from benchmarks.grid_layout import Degrees, stage_on
from ds_lowrank.methods.galore import GaLoreMethod, GaLoreOptions
from ds_lowrank.optimizer.stacks import Stacks
from ds_lowrank.sharding.plan import Plans
from ds_lowrank.sharding.reduce import Executor, Request

SIZES = {"hidden_size": 64, "intermediate_size": 172, "vocab_size": 500}
ROWS, LAYERS = 64, 32
"""The rows of a square matrix, and the layers."""
RANK, GAP = 16, 10**9
"""The rank is to the hidden size as 1024 to 4096."""
WORLDS, STAGES = (8, 64, 256, 1024), (1, 3)
WARM_UP = 3


class OneOfMany(Executor):
    """One rank of a world whose other ranks send ones.

    Args:
        rank: The rank.
        size: How many ranks there are.
        plans: Those of the rank, which it keeps from step to step.

    Attributes:
        rounds: Exchanges so far.
        bytes_sent: What this rank packed for others.
        seconds: What packing and unpacking took.
    """

    def __init__(self, rank: int, size: int, plans: Plans) -> None:
        self.rank, self.size, self._plans = rank, size, plans
        self.rounds, self.bytes_sent, self.seconds = 0, 0, 0.0

    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        """Pack what the rank would send, and unpack ones."""
        started = time.perf_counter()
        plan = self._plans.plan(requests)
        buffer, send = plan.pack(requests)
        plan.received(buffer).fill_(1)
        answers = plan.answers(requests, buffer)
        self.seconds += time.perf_counter() - started
        self.rounds += 1
        self.bytes_sent += send.nbytes
        return answers


class MiddleRank:
    """The rank in the middle of a world, ready for ordinary steps.

    Args:
        zero: The ZeRO stage, 1 or 3.
        world: How many ranks hold the matrices.
        layers: Layers of the model.
        seed: Of GaLore.

    Attributes:
        executors: Of each step so far, with what it counted.
    """

    def __init__(self, zero: int, world: int, layers: int, seed: int) -> None:
        self.rank, self.world = world // 2, world
        chosen = GaLoreOptions(rank=RANK, update_proj_gap=GAP, seed=seed)
        degrees = Degrees(data=world, tensor=1, zero=zero)
        self.stage = stage_on(self.rank, model(world, layers), degrees, 0, chosen, "cpu")
        self.stacks, self.plans = Stacks(GaLoreMethod), Plans(self.rank, world)
        self.executors: list[OneOfMany] = []

    def step(self) -> None:
        """Take one step that refreshes nothing."""
        self.executors.append(OneOfMany(self.rank, self.world, self.plans))
        self.executors[-1].run(step(self.stage, self.world, len(self.executors), self.stacks))


def model(world: int, layers: int) -> dict[str, int]:
    """Return the sizes of the model, with at least as many rows in every matrix as there are ranks."""
    factor = -(-world // ROWS)
    return {key: factor * size for key, size in SIZES.items()} | {"num_hidden_layers": layers}


def planned(zero: int, world: int, layers: int, seed: int) -> dict[str, float]:
    """Return seconds and MiB of planning the steps of one world. They are right only in a new process."""
    torch.set_num_threads(1)
    MiddleRank(1, 2, 1, seed).step()  # whatever libraries allocate once is allocated here
    before, marks = psutil.Process().memory_info().rss, [time.perf_counter()]
    rank = MiddleRank(zero, world, layers, seed)
    for _ in range(2):
        rank.step()
        marks.append(time.perf_counter())
    start, first, second = marks
    grown = psutil.Process().memory_info().rss - before
    return {"plan s": (first - start) - (second - first), "plan MiB": grown / 2**20}


def in_new_process(zero: int, world: int, layers: int, seed: int) -> dict[str, float]:
    """Return what :func:`planned` finds in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        found: dict[str, float] = pool.apply(planned, (zero, world, layers, seed))
    return found


def measure(worlds: Iterable[int], layers: int, repeats: int, seed: int) -> Numbers:
    """Return the records of ordinary steps, one for each ZeRO stage and world.

    Args:
        worlds: Numbers of ranks.
        layers: Layers of the model.
        repeats: Timed steps of each world.
        seed: Of GaLore.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cells = {(zero, world): MiddleRank(zero, world, layers, seed) for zero in STAGES for world in worlds}
        taken = medians(interleaved({str(cell): rank.step for cell, rank in cells.items()}, repeats, WARM_UP))
    finally:
        torch.set_num_threads(threads)
    return [
        {
            "ZeRO": zero,
            "ranks": world,
            "ms": 1e3 * seconds,
            "us a matrix": 1e6 * seconds / len(rank.stage.matrices),
            "exchange ms": 1e3 * median(each.seconds for each in rank.executors[WARM_UP:]),
            "rounds": rank.executors[-1].rounds,
            "kB sent": rank.executors[-1].bytes_sent / 1e3,
            "holds": sum(matrix.geometry.part.numel > 0 for matrix in rank.stage.matrices),
        }
        for ((zero, world), rank), seconds in zip(cells.items(), taken.values(), strict=True)
    ]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="numbers of ranks")
    parser.add_argument("--repeats", type=int, default=51, help="timed steps of each world")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    worlds, layers, repeats = ([3], 1, 3) if arguments.quick else (arguments.worlds, LAYERS, arguments.repeats)
    rows = measure(worlds, layers, repeats, arguments.seed)
    report([row | in_new_process(row["ZeRO"], row["ranks"], layers, arguments.seed) for row in rows], arguments)


if __name__ == "__main__":
    main()
