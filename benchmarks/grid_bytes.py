"""Bytes that a step of GaLore sends on a grid of data x tensor x pipeline ranks, and rounds, at a model's shapes.

python -m benchmarks.grid_bytes

Counted is what the optimizer itself sends, in fp32: projections, bases and the decision. The method's own programs run
on meta tensors, on one rank of every stage: a request names what every rank has and wants, so what one rank asks for
says what all of them send, if it also asks as other ranks do for the matrices that only they have. With --simulated
they run on every rank of a simulated world, which counts what it packs. An ordinary step follows one that refreshes:
with --basis-placement replicated no basis is gathered in it, and how much memory that takes is recorded too.

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
from ds_lowrank.optimizer.simulated import StacksOfAllRanks
from ds_lowrank.optimizer.stack import SteppedMatrix
from ds_lowrank.optimizer.stacks import Stacks
from ds_lowrank.optimizer.step import StepReport, step_matrices
from ds_lowrank.sharding.layout import length
from ds_lowrank.sharding.ledger import Ledger, numbers_sent
from ds_lowrank.sharding.matrix import shard_of
from ds_lowrank.sharding.reduce import Rounds
from ds_lowrank.sharding.world import SimulatedWorld

MODELS = Path(__file__).parents[1] / "ds_configs/models"
RANK = 1024
"""GaLore's at 7B."""
KINDS = {"refresh": 0, "ordinary": 1}
"""The number of a step of each kind."""
ASKED = Degrees(8, 8, 4)
GRIDS = (
    *(Degrees(data, 8, 4) for data in (1, 2, 4, 8, 16, 32, 64, 128)),
    *(Degrees(8, tensor, 4) for tensor in (1, 2, 4)),
    *(Degrees(8, 8, pipeline) for pipeline in (1, 2, 8)),
    *(Degrees(data, 8, zero=3) for data in (1, 2, 4, 8, 16, 32, 64, 128)),
    *(Degrees(64, tensor, zero=3) for tensor in (1, 2, 4)),
)


def step(stage: Stage, ranks: int, number: int, stacks: Stacks | None = None) -> Rounds[StepReport]:
    """Step number ``number`` of a stage, as the optimizer takes it; AdamW on the rest sends nothing.

    Args:
        stage: what the rank steps.
        ranks: how many ranks share it.
        number: of the step.
        stacks: forms the stacks; None to form them for this step alone.
    """
    for matrix in stage.matrices:
        matrix.state["step"] = number
    others = [stage.matrices[0].fragment.gradient] * (stage.parameters - len(stage.matrices))
    return step_matrices(GaLoreMethod, stage.matrices, ranks, others, stacks=stacks)


def simulated(
    model: Mapping[str, int], degrees: Degrees, stage: int, options: GaLoreOptions, kind: str, device: str = "meta"
) -> SimulatedWorld:
    """A world of the ranks that share a stage, after the last of the steps that lead to that kind of step."""
    stages = [stage_on(rank, model, degrees, stage, options, device) for rank in range(degrees.sharing)]
    stacks = [Stacks(GaLoreMethod) for _ in stages]
    for number in range(KINDS[kind] + 1):
        world = SimulatedWorld(degrees.sharing)
        world.run([step(one, degrees.sharing, number, own) for one, own in zip(stages, stacks, strict=True)])
    return world


def counted(
    model: Mapping[str, int], degrees: Degrees, stage: int, options: GaLoreOptions, kind: str, rank: int = 0
) -> Ledger:
    """The same, as one rank's requests tell it."""
    shared, stacks = stage_on(rank, model, degrees, stage, options), StacksOfAllRanks(GaLoreMethod)
    for number in range(KINDS[kind] + 1):
        ledger = Ledger(rank, degrees.sharing)
        ledger.run(step(shared, degrees.sharing, number, stacks))
    return ledger


def basis_gathered(matrix: SteppedMatrix, options: GaLoreOptions) -> int:
    """Bytes in all of gathering a basis: the first round of an ordinary step, unless bases are kept gathered."""
    rank, geometry = GaLoreMethod.rank(matrix.geometry.shape, options), matrix.geometry
    request = shard_of(matrix.name, geometry).compressed.all_gather(torch.empty(1, 0, rank))
    return 4 * int(numbers_sent(request, len(geometry.parts)).sum())


def bases_kept(stage: Stage, options: GaLoreOptions) -> np.ndarray:
    """Bytes of bases that each of the ranks that share a stage keeps gathered between refreshes."""
    found = np.zeros(len(stage.matrices[0].geometry.parts), dtype=np.int64)
    for geometry in (matrix.geometry for matrix in stage.matrices) if options.keeps_bases_gathered else ():
        for rank, spans in geometry.compressed.held.items():
            found[rank] += 4 * length(spans) * GaLoreMethod.rank(geometry.shape, options)
    return found


def all_gathered(matrix: SteppedMatrix) -> int:
    """Bytes in all where every rank that holds a part sends it to each of the others."""
    (m, n), holders = matrix.geometry.shape, matrix.geometry.holders
    return 4 * m * n * (len(holders) - 1)


def gathered(matrix: SteppedMatrix) -> int:
    """Bytes in all where the factoring rank gets the whole gradient, and sends the others their parts of the update."""
    (m, n), own = matrix.geometry.shape, matrix.geometry.parts[matrix.member.root]
    return 2 * 4 * (m * n - own.numel)


def measure(
    model: Mapping[str, int], degrees: Degrees, options: GaLoreOptions, counting: Callable[..., Ledger | SimulatedWorld]
) -> Numbers:
    """One record for each kind of step; bytes over the ranks of all stages, rounds of one of them."""
    stages = [stage_on(0, model, degrees, number, options) for number in range(degrees.pipeline)]
    matrices = [matrix for stage in stages for matrix in stage.matrices]
    peers = {"all-gather": sum(map(all_gathered, matrices)), "gather": sum(map(gathered, matrices))}
    basis = sum(basis_gathered(matrix, options) for matrix in matrices)
    kept = np.concatenate([bases_kept(stage, options) for stage in stages])
    memory = {"kept Q, MB a rank": float(kept.mean()) / 1e6, "kept Q, MB, largest rank": int(kept.max()) / 1e6}
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
                **(memory if options.keeps_bases_gathered else {}),
                **{f"of {peer}": total / bytes_ if bytes_ else None for peer, bytes_ in peers.items()},
            }
        )
    return found


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    parser.add_argument("--size", default="7b", help="a model of ds_configs/models")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--basis-placement", choices=("partitioned", "replicated"), default="partitioned")
    parser.add_argument("--simulated", action="store_true", help="8 x 8 x 4 alone, every rank of it simulated")
    return parser.parse_args()


def main() -> None:
    """Count, print and record."""
    arguments = parse()
    model = json.loads((MODELS / f"llama_{arguments.size}.json").read_text())
    chosen = GaLoreOptions(rank=arguments.rank, seed=arguments.seed, basis_placement=arguments.basis_placement)
    grids = (ASKED,) if arguments.quick or arguments.simulated else GRIDS
    counting = simulated if arguments.simulated else counted
    report([row for degrees in grids for row in measure(model, degrees, chosen, counting)], arguments)


if __name__ == "__main__":
    main()
