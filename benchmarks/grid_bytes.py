"""Bytes that a step of GaLore sends on a grid of data x tensor x pipeline ranks, and rounds, at a model's shapes.

python -m benchmarks.grid_bytes

Counted is what the optimizer itself sends, in fp32: projections, bases and the decision. The method's own programs run
on meta tensors, on one rank of every stage: a request names what every rank has and wants, so what one rank asks for
says what all of them send. With --simulated they run on every rank of a simulated world, which counts what it packs.

Two peers that see whole gradients, in fp32. *all-gather*: every rank that holds a part of a matrix gets all of its
gradient. *gather*: one of them does, and sends each of the others its part of the update back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Numbers, options, report
from benchmarks.grid_layout import Degrees, Stage, stage_on
from ds_lowrank.methods.galore import GaLoreMethod, GaLoreOptions
from ds_lowrank.optimizer.step import StepReport, step_matrices
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Executor, Request, Rounds
from ds_lowrank.sharding.route import Route
from ds_lowrank.sharding.world import SimulatedWorld

MODELS = Path(__file__).parents[1] / "ds_configs/models"
RANK = 1024
"""GaLore's at 7B."""
KINDS = {"refresh": 0, "ordinary": 1}
"""A step of each kind."""
ASKED = Degrees(8, 8, 4)
GRIDS = (
    *(Degrees(data, 8, 4) for data in (1, 2, 4, 8, 16, 32, 64, 128)),
    *(Degrees(8, tensor, 4) for tensor in (1, 2, 4)),
    *(Degrees(8, 8, pipeline) for pipeline in (1, 2, 8)),
    *(Degrees(data, 8, zero=3) for data in (1, 2, 4, 8, 16, 32, 64, 128)),
    *(Degrees(64, tensor, zero=3) for tensor in (1, 2, 4)),
)


def step(stage: Stage, ranks: int, number: int) -> Rounds[StepReport]:
    """Step number ``number`` of a stage, as the optimizer takes it; AdamW on the rest sends nothing."""
    for matrix in stage.matrices:
        matrix.state["step"] = number
    others = [stage.matrices[0].shard.flat_gradient] * (stage.parameters - len(stage.matrices))
    return step_matrices(GaLoreMethod, stage.matrices, ranks, others)


class Ledger(Executor):
    """Answers one rank's requests with meta tensors, and notes what each rank of the group sends.

    Attributes:
        rounds: collectives so far.
        bytes_sent: for each rank.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.rounds = rank, size, 0
        self.bytes_sent = np.zeros(size, dtype=np.int64)

    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        """Count what is sent, and answer with tensors of the right shapes."""
        self.rounds += 1
        for request in requests:
            self.bytes_sent += 4 * request.value.shape[1] * rows_sent(request.route)
        return [
            torch.empty(request.route.plan(self.rank).rows, request.value.shape[1], device="meta")
            for request in requests
        ]


def rows_sent(route: Route) -> np.ndarray:
    """How many rows each rank sends to others: those that it has, once for every other rank that wants them."""
    size = max((hi for spans in (*route.have, *route.want) for _, hi in spans), default=0)
    edges = np.zeros(size + 1, dtype=np.int64)
    for spans in route.want:
        for lo, hi in spans:
            edges[lo] += 1
            edges[hi] -= 1
    wanted = np.concatenate([[0], np.cumsum(np.cumsum(edges))])  # by how many ranks, summed over the rows before
    return np.array(
        [
            sum(wanted[hi] - wanted[lo] for lo, hi in have)
            - sum(max(0, min(b, d) - max(a, c)) for a, b in have for c, d in want)
            for have, want in zip(route.have, route.want, strict=True)
        ]
    )


def simulated(
    model: Mapping[str, int], degrees: Degrees, stage: int, options: GaLoreOptions, kind: str, device: str = "meta"
) -> SimulatedWorld:
    """A world of the ranks that share a stage, after a step of zeros on all of them."""
    world = SimulatedWorld(degrees.sharing)
    stages = [stage_on(rank, model, degrees, stage, options, device) for rank in range(degrees.sharing)]
    world.run([step(one, degrees.sharing, KINDS[kind]) for one in stages])
    return world


def counted(
    model: Mapping[str, int], degrees: Degrees, stage: int, options: GaLoreOptions, kind: str, rank: int = 0
) -> Ledger:
    """The same, as one rank's requests tell it."""
    ledger = Ledger(rank, degrees.sharing)
    ledger.run(step(stage_on(rank, model, degrees, stage, options), degrees.sharing, KINDS[kind]))
    return ledger


def basis_gathered(shard: MatrixShard, options: GaLoreOptions) -> int:
    """Bytes in all of the first round of an ordinary step."""
    rank = GaLoreMethod.rank(shard.shape, options)
    return 4 * rank * int(rows_sent(shard.compressed.all_gather(torch.empty(0, rank)).route).sum())


def all_gathered(shard: MatrixShard) -> int:
    """Bytes in all where every rank that holds a part sends it to each of the others."""
    holders = sum(part.numel > 0 for part in shard.parts)
    return 4 * shard.shape[0] * shard.shape[1] * (holders - 1)


def gathered(shard: MatrixShard) -> int:
    """Bytes in all where the factoring rank gets the whole gradient, and sends the others their parts of the update."""
    return 2 * 4 * (shard.shape[0] * shard.shape[1] - shard.parts[shard.root].numel)


def measure(
    model: Mapping[str, int], degrees: Degrees, options: GaLoreOptions, counting: Callable[..., Ledger | SimulatedWorld]
) -> Numbers:
    """One record for each kind of step; bytes over the ranks of all stages, rounds of one of them."""
    stages = [stage_on(0, model, degrees, number, options) for number in range(degrees.pipeline)]
    shards = [matrix.shard for stage in stages for matrix in stage.matrices]
    peers = {"all-gather": sum(map(all_gathered, shards)), "gather": sum(map(gathered, shards))}
    basis = sum(basis_gathered(shard, options) for shard in shards)
    decision = 4 * max(stage.parameters for stage in stages) * (degrees.sharing - 1)
    found = []
    for kind in ("ordinary", "refresh"):
        ledgers = [counting(model, degrees, number, options, kind) for number in range(degrees.pipeline)]
        sent = [of_rank for ledger in ledgers for of_rank in ledger.bytes_sent]
        total = int(sum(sent))
        found.append(
            {
                "ZeRO": degrees.zero,
                **{axis: getattr(degrees, axis) for axis in ("data", "tensor", "pipeline")},
                "step": kind,
                "rounds": max(ledger.rounds for ledger in ledgers),
                "GB, all ranks": total / 1e9,
                "MB a rank": total / len(sent) / 1e6,
                "MB, largest rank": int(max(sent)) / 1e6,
                "decision, kB a rank": decision / 1e3,
                "gather Q, GB": basis / 1e9,
                **{f"of {peer}": total / bytes_ if bytes_ else None for peer, bytes_ in peers.items()},
            }
        )
    return found


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    parser.add_argument("--size", default="7b", help="a model of ds_configs/models")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--simulated", action="store_true", help="8 x 8 x 4 alone, every rank of it simulated")
    return parser.parse_args()


def main() -> None:
    """Count, print and record."""
    arguments = parse()
    model = json.loads((MODELS / f"llama_{arguments.size}.json").read_text())
    chosen = GaLoreOptions(rank=arguments.rank, seed=arguments.seed)
    grids = (ASKED,) if arguments.quick or arguments.simulated else GRIDS
    counting = simulated if arguments.simulated else counted
    report([row for degrees in grids for row in measure(model, degrees, chosen, counting)], arguments)


if __name__ == "__main__":
    main()
