"""Bytes that a data-parallel rank sends in a step whose gradients are projected before they are summed.

python -m benchmarks.projected_bytes

The peer is what every data-parallel training sends: a ring all-reduce of the whole gradient, 2 (N - 1) / N of its bytes
for each of N ranks. With projected reduction a rank sends its part of R = H Q to the owners of the rows, and the rows
of the direction that it owns to the others; only what takes AdamW (embedding, head, norms) is all-reduced whole. Bases
are kept gathered, so an ordinary step sends none. All in fp32.

Counted on meta tensors: the method's own programs run for every rank holding the whole of every matrix, and their
requests say what each rank sends (benchmarks.grid_bytes). *amortised* has one refresh in 200 steps. *gathered* is the
memory for the bases on every rank, *moments* that of a rank for Adam's moments of the matrices.

``reverse_std`` compresses the longer dimension: R and the moments have fewer rows, and the basis has more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common import Numbers, options, report
from benchmarks.grid_bytes import bases_kept, counted
from benchmarks.grid_layout import Degrees, parameters_of, stage_on
from ds_lowrank.methods.galore import GaLoreOptions

MODELS = Path(__file__).parents[1] / "ds_configs/models"
CASES = (("60m", 128), ("350m", 128), ("1b", 256), ("7b", 256), ("7b", 1024))
"""Sizes of ds_configs/models, and GaLore's ranks for them."""
WORLDS = (2, 8, 64)
GAP = 200
BYTES = 4


def ring(numel: int, ranks: int) -> float:
    """Return what each rank sends in a ring all-reduce of so many fp32 numbers."""
    return BYTES * numel * 2 * (ranks - 1) / ranks


def measure(model: Mapping[str, int], chosen: GaLoreOptions, ranks: int) -> dict[str, float]:
    """Return the bytes of one world, in MB (10^6 bytes).

    Args:
        model: Sizes, under the keys of Hugging Face's configurations.
        chosen: GaLore's options.
        ranks: How many data-parallel ranks there are.
    """
    degrees = Degrees(ranks, tensor=1, zero=0)
    stage = stage_on(0, model, degrees, 0, chosen)
    everything = sum(parameter.numel() for _, parameter in parameters_of(model, degrees, 0))
    matrices = sum(matrix.geometry.part.numel for matrix in stage.matrices)
    whole, rest = ring(everything, ranks), ring(everything - matrices, ranks)
    ordinary, refresh = (
        int(counted(model, degrees, 0, chosen, kind).bytes_sent.max()) for kind in ("ordinary", "refresh")
    )
    amortised = rest + ordinary + (refresh - ordinary) / GAP
    moments = sum(
        2 * BYTES * matrix.geometry.kept.size * min(chosen.rank, *matrix.geometry.shape) for matrix in stage.matrices
    )
    return {
        "whole gradient, MB": whole / 1e6,
        "AdamW's, MB": rest / 1e6,
        "projected, MB": ordinary / 1e6,
        "with a refresh, MB": refresh / 1e6,
        "of the whole": (rest + ordinary) / whole,
        "amortised": amortised / whole,
        "gathered, MB": int(bases_kept(stage, chosen).max()) / 1e6,
        "moments, MB": moments / ranks / 1e6,
    }


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="numbers of data-parallel ranks")
    return parser.parse_args()


def main() -> None:
    """Count, print and record."""
    arguments = parse()
    cases, worlds = (CASES[:1], [2]) if arguments.quick else (CASES, arguments.worlds)
    found: Numbers = []
    for size, rank in cases:
        model = json.loads((MODELS / f"llama_{size}.json").read_text())
        for side in ("std", "reverse_std"):
            chosen = GaLoreOptions(
                rank=rank, proj_type=side, update_proj_gap=GAP, reduction="projected", seed=arguments.seed
            )
            for ranks in worlds:
                case = {"model": size, "rank": rank, "proj_type": side, "ranks": ranks}
                found.append(case | measure(model, chosen, ranks))
    report(found, arguments)


if __name__ == "__main__":
    main()
