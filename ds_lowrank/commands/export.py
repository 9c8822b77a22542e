"""``python -m ds_lowrank export``: the weights of a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ds_lowrank.commands.checkpoint import add_model_arguments, guarded, of_model

ABOUT = "write the weights of a checkpoint as a Hugging Face folder"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", type=Path, metavar="CHECKPOINT", help="its folder, or the one with latest above it")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    add_model_arguments(parser)


def run(arguments: Namespace) -> int:
    """Write it; 1 with one line if the checkpoint is damaged or something cannot be read or written."""
    return guarded("export", lambda: _export(arguments))


def _export(arguments: Namespace) -> int:
    from ds_lowrank.checkpoint.convert import Wanted, convert

    print(convert(arguments.folder, arguments.out, Wanted(to="huggingface", **of_model(arguments))))
    return 0
