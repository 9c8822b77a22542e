"""Bytes on a rank by ``python -m ds_lowrank estimate``, at published sizes: nothing is run.

python -m benchmarks.estimates

GaLore at the rank of its paper for each size, moments in fp32, and AdamW, in bf16 on eight ranks, one micro-batch of
one sequence, activations recomputed. *projected* is GaLore at ZeRO 0 with ``reduction`` ``projected``, no masters,
8-bit moments, ``stagger`` and a first basis that is ``random``. GB are of the rank that needs most; *sent* is what a
rank sends in an ordinary step, mean over the ranks. Buffers that DeepSpeed makes at ZeRO 1 to 3 have the size of its
defaults, 10^9 bytes and more, whatever the model.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from benchmarks.common import Numbers, options, report
from ds_lowrank.estimate.setup import Setup
from ds_lowrank.estimate.total import Estimate, Estimator
from ds_lowrank.models.llama import load_config
from ds_lowrank.training.config import BatchSizes
from ds_lowrank.training.parallelism import GridShape

MODELS = Path(__file__).parents[1] / "ds_configs/models"
RANKS_OF_SIZES = {"60m": 128, "350m": 256, "1b": 512, "7b": 1024}
WORLD, LENGTH = 8, 1024
STAGES = (0, 2, 3)


def setup(size: str, optimizer: dict[str, Any], zero: int) -> Setup:
    """The run of a row."""
    config = {
        "optimizer": optimizer,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": zero},
        "gradient_clipping": 0.0,
    }
    model = load_config(MODELS / f"llama_{size}.json")
    return Setup(model, config, GridShape(WORLD), BatchSizes(WORLD, 1, 1), LENGTH, checkpointing=True)


def rows(size: str, estimator: Estimator) -> Numbers:
    """The rows of a model."""
    galore = {"type": "GaLore", "params": {"rank": RANKS_OF_SIZES[size]}}
    small = {"reduction": "projected", "master_weights": False, "state_dtype": "int8"}
    small |= {"stagger": True, "first_basis": "random"}  # so that few gradients are whole in any step
    projected = {"type": "GaLore", "params": {**galore["params"], **small}}  # type: ignore[dict-item]
    cases = [(f"ZeRO {zero}", one, zero) for zero in STAGES for one in ({"type": "AdamW", "params": {}}, galore)]
    cases.append(("projected", projected, 0))
    return [row(size, name, estimator.estimate(setup(size, one, zero))) for name, one, zero in cases]


def row(size: str, name: str, found: Estimate) -> dict[str, Any]:
    """The row of an estimate."""
    (rank,) = found.ranks
    states = rank.optimizer.states
    parts = {
        "weights": rank.kept.weights,
        "masters": rank.kept.masters,
        "gradients": rank.kept.gradients,
        "moments and bases": states.matrices + rank.optimizer.gathered,
        "AdamW's states": states.rest,
        "activations": rank.activations.peak,
        "peak": rank.peak,
        "sent": rank.traffic.total,
    }
    in_gb = {f"{key} GB": round(value / 1e9, 3) for key, value in parts.items()}
    return {"model": size, "optimizer": found.setup.method, "layout": name, **in_gb}


def main() -> None:
    """Estimate and report."""
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(RANKS_OF_SIZES), choices=list(RANKS_OF_SIZES))
    arguments: argparse.Namespace = parser.parse_args()
    logging.disable(logging.WARNING)
    sizes = arguments.sizes[:1] if arguments.quick else arguments.sizes
    report([one for size in sizes for one in rows(size, Estimator())], arguments)


if __name__ == "__main__":
    main()
