"""Bytes of optimizer state at a model's shapes, from the accounting of the role table.

python -m benchmarks.state_bytes

Nothing is allocated: the model and the state are meta tensors. All tensors of the state are counted, over all ranks:
those of the projected matrices (moments, bases, magnitudes, scales of codes) and the rest (AdamW's moments and their
scales), at rank 128, and for the 7B also at 1024, the rank of the published scripts for that size. AdamW in bf16 keeps
two moments of two bytes per parameter; *below* is the saving relative to that.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

import ds_lowrank
from benchmarks.common import Numbers, options, report
from ds_lowrank.optimizer.report import state_bytes

MODELS = Path(__file__).parents[1] / "ds_configs/models"
RANKS = {"7b": (128, 1024)}
"""By size; 128 for the others."""
METHODS = ("GaLore", "GradNormLoRP", "Lorenza", "Tandem")
FORMATS = (("fp32", "fp32"), ("bf16", "fp32"), ("int8", "fp32"), ("bf16", "bf16"), ("int8", "int4"))
"""``state_dtype`` and ``basis_dtype``."""


def bytes_of(model: torch.nn.Module, name: str, params: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of state of the projected matrices and of all other parameters."""
    optimizer = getattr(ds_lowrank, name)(model, **params)
    optimizer.bind()
    return state_bytes(optimizer.slots)


def label(moments: str, bases: str) -> str:
    """Return what the table calls a choice of formats; bases are in fp32 where it does not say otherwise."""
    return moments if bases == "fp32" else f"{moments}, bases {bases}"


def measure(size: str, rank: int) -> Numbers:
    """Return one record per optimizer for a model of ``ds_configs/models``; AdamW comes last."""
    from transformers import LlamaForCausalLM

    from ds_lowrank.models import llama

    config = llama.load_config(MODELS / f"llama_{size}.json")
    with torch.device("meta"):
        model: torch.nn.Module = LlamaForCausalLM(config)
    adamw = 4 * sum(parameter.numel() for parameter in model.parameters())
    found = {
        f"{name}, {label(moments, bases)}": bytes_of(
            model, name, {"rank": rank, "state_dtype": moments, "basis_dtype": bases}
        )
        for name in METHODS
        for moments, bases in FORMATS
    }
    return [
        {
            "model": size,
            "rank": rank,
            "optimizer": name,
            "matrices GB": matrices / 1e9,
            "rest GB": rest / 1e9,
            "all GB": (matrices + rest) / 1e9,
            "below AdamW in bf16": 1 - (matrices + rest) / adamw,
        }
        for name, (matrices, rest) in (found | {"AdamW, bf16": (0, adamw)}).items()
    ]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["60m", "1b", "7b"])
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    logging.disable(logging.WARNING)
    sizes = arguments.sizes[:1] if arguments.quick else arguments.sizes
    runs = [(size, rank) for size in sizes for rank in RANKS.get(size, (128,))]
    report([row for size, rank in runs for row in measure(size, rank)], arguments)


if __name__ == "__main__":
    main()
