"""``python -m ds_lowrank checkpoint``: list, show, verify and convert checkpoints, in one process without an engine."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

ABOUT = "list, show, verify and convert checkpoints"
TARGETS = ("universal", "deepspeed", "huggingface", "ours")
SOURCES = ("ours", "deepspeed", "universal")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("list", help="the checkpoints in a folder, and whether they are whole")
    one.add_argument("folder", type=Path, metavar="DIR", help="where a run saves its checkpoints")
    one.add_argument("--verify", action="store_true", help="read all files; otherwise only sizes are compared")
    for name, about in (("show", "what a checkpoint has"), ("verify", "read all of it; 1 if it is damaged")):
        one = actions.add_parser(name, help=about)
        one.add_argument("folder", type=Path, metavar="CHECKPOINT", help="its folder, or the one with latest above it")
    one = actions.add_parser("convert", help="to and from DeepSpeed's own formats, and to a Hugging Face folder")
    one.add_argument("folder", type=Path, metavar="CHECKPOINT", help="its folder, or the one with latest above it")
    one.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    one.add_argument("--to", choices=TARGETS, required=True, help="the format of OUT")
    one.add_argument("--from", dest="source", choices=SOURCES, help="that of CHECKPOINT; by default it is looked at")
    one.add_argument("--weights-only", action="store_true", help="with --to ours: without AdamW's moments")
    add_model_arguments(one)


def add_model_arguments(parser: ArgumentParser) -> None:
    """Add what says which model a checkpoint is of, and how a Hugging Face folder is written.

    Args:
        parser: of a command that converts.
    """
    parser.add_argument("--config", type=Path, metavar="PATH", help="Hugging Face folder or config.json of the model")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or name of a tokenizer to put into OUT")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32 by default")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of each safetensors file; 5GB by default")


def of_model(arguments: Namespace) -> dict[str, Any]:
    """What :func:`add_model_arguments` has added, as a conversion takes it.

    Args:
        arguments: of the command.
    """
    return {key: getattr(arguments, key) for key in ("config", "tokenizer", "dtype", "max_shard_size")}


def run(arguments: Namespace) -> int:
    """Do it; 1 with one line if a checkpoint is damaged or something cannot be read or written."""
    return guarded("checkpoint", lambda: ACTIONS[arguments.action](arguments))


def guarded(command: str, act: Any) -> int:
    """Run a command; 1 with one line after an error of the user's or the disk's.

    Args:
        command: its name.
        act: returns the exit code.
    """
    import torch
    from safetensors import SafetensorError

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses when it is first imported
    logging.getLogger("ds_lowrank").setLevel(logging.WARNING)
    try:
        return int(act())
    except (ValueError, OSError, SafetensorError) as error:
        print(f"python -m ds_lowrank {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _list(arguments: Namespace) -> int:
    from ds_lowrank.checkpoint.listing import HEADER, rows, table

    found = rows(arguments.folder, read=arguments.verify)
    print(table([HEADER, *found]))
    return 0 if all(row[-1] == "whole" for row in found) else 1


def _show(arguments: Namespace) -> int:
    from ds_lowrank.checkpoint.listing import show
    from ds_lowrank.checkpoint.saved import find, opened

    with opened(find(arguments.folder), check=False) as saved:
        print(show(saved))
    return 0


def _verify(arguments: Namespace) -> int:
    from ds_lowrank.checkpoint.saved import find
    from ds_lowrank.checkpoint.verify import verify

    folder = find(arguments.folder)
    print(f"{folder} is whole: {verify(folder)}")
    return 0


def _convert(arguments: Namespace) -> int:
    from ds_lowrank.checkpoint.convert import Wanted, convert

    own = {"to": arguments.to, "source": arguments.source, "weights_only": arguments.weights_only}
    wanted = Wanted(**own, **of_model(arguments))
    print(convert(arguments.folder, arguments.out, wanted))
    return 0


ACTIONS = {"list": _list, "show": _show, "verify": _verify, "convert": _convert}
