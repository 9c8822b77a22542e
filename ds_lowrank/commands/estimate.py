"""``python -m ds_lowrank estimate``: what a run needs on every kind of rank, and what it sends, before it is started.

Weights, masters, gradients, moments, bases, temporary tensors of a step and of a refresh, and activations, in bytes,
beside AdamW at the same ZeRO stage. Nothing is allocated. With ``--fit SIZE`` it looks for the cheapest configuration
that fits on such a card.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

ABOUT = "estimate the memory of a run on every rank, and what it sends"
MOST = 2**20
"""The most ranks, sequences or tokens that a flag takes."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", type=Path, required=True, help="a LlamaConfig JSON, or a Hugging Face folder")
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="the DeepSpeed JSON")
    parser.add_argument("--gpus", type=_positive, default=1, metavar="N", help="ranks of the job; 1 by default")
    parser.add_argument("--micro-batch-size", type=_positive, metavar="B", help="overrides that of the JSON")
    parser.add_argument("--global-batch-size", type=_positive, metavar="B", help="overrides that of the JSON")
    parser.add_argument("--sequence-length", type=_positive, metavar="S", help="the model's longest by default")
    parser.add_argument("--tensor-parallel", type=_positive, default=1, metavar="T", help="ranks that split a layer")
    parser.add_argument("--pipeline-parallel", type=_positive, default=1, metavar="P", help="stages of a pipeline")
    parser.add_argument("--activation-checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--fit", type=_size, metavar="SIZE", help="look for what fits on a card of 24GB, for example")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: Namespace) -> int:
    """Print the estimate; 1 if nothing fits, 2 after an error of the user's, which is printed in one line."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is first imported
    logging.getLogger("ds_lowrank").setLevel(logging.WARNING)
    arguments.sequence_parallel = False
    try:
        return _estimate(arguments)
    except (ValueError, OSError) as error:
        print(f"python -m ds_lowrank estimate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _estimate(arguments: Namespace) -> int:
    from ds_lowrank.estimate.fit import search, search_text
    from ds_lowrank.estimate.setup import read_setup
    from ds_lowrank.estimate.table import columns_of, text_of
    from ds_lowrank.estimate.total import Estimator

    setup, estimator = read_setup(arguments), Estimator()
    estimates = [estimator.estimate(one) for one in columns_of(setup)]
    tried = search(setup, arguments.fit, estimator) if arguments.fit else None
    if arguments.json:
        found = {"runs": [one.as_json() for one in estimates]}
        print(json.dumps(found | ({"fit": tried.as_json()} if tried else {}), indent=2))
    else:
        print(text_of(estimates))
        if tried is not None:
            print(f"\n{search_text(tried)}")
    return 1 if tried is not None and tried.best is None else 0


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= MOST:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST}")
    return int(text)


def _size(text: str) -> int:
    from ds_lowrank.estimate.sizes import read_size

    try:
        return read_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
