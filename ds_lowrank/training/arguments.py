"""The command line of launch/pretrain.py, and the parts of it that both programs share."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import deepspeed

from ds_lowrank.training.stop_on import OneOfEachKind, condition
from ds_lowrank.training.time_limits import SETUP_TIMEOUT, TIMEOUT
from ds_lowrank.training.usage import JobParser

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ds_lowrank"
LARGEST = 2**31 - 1
"""The most steps, sequences, tokens or ranks that a flag takes."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of launch/pretrain.py.

    Args:
        arguments: the arguments; None for those of the process. Errors end the process with a usage message.
    """
    parser = script_parser("Pre-train a LLaMA with the optimizer that the DeepSpeed configuration names.")
    _add_inputs(parser.add_argument_group("model and data"))
    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=positive, required=True, help="total number of optimizer steps")
    add_run(run)
    run.add_argument("--eval-interval", type=count, default=0, help="in steps; 0 evaluates at the end only")
    run.add_argument(
        "--eval-sequences", type=count, default=64, help="held-out sequences on all ranks together; 0 for none"
    )
    _add_grid(parser.add_argument_group("parallelism in addition to ZeRO"))
    add_outputs(parser.add_argument_group("output"))
    return parsed(parser, arguments)


def _add_grid(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tensor-parallel", type=positive, default=1, metavar="T", help="ranks that split every layer")
    group.add_argument(
        "--pipeline-parallel", type=positive, default=1, metavar="P", help="stages that the layers are divided into"
    )
    group.add_argument(
        "--sequence-parallel", action="store_true", help="tensor-parallel ranks also split the sequence between layers"
    )


def script_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments that both programs share.

    These include ``--local_rank``, which the ``deepspeed`` launcher adds to the user's command line.

    Args:
        description: what the program does, for ``--help``.
    """
    parser = JobParser(
        description=description,
        epilog="Run it with `deepspeed` or `torchrun`, or with `python` as a single process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    deepspeed.add_config_arguments(parser)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments, require ``--deepspeed_config`` and fill in the default of ``--save``.

    Args:
        parser: the complete parser.
        arguments: the arguments; None for those of the process. Errors end the process with a usage message.
    """
    found = parser.parse_args(arguments)
    if found.deepspeed_config is None:
        parser.error("the following arguments are required: --deepspeed_config")
    if not found.deepspeed_config.strip():
        parser.error("--deepspeed_config is empty: name the DeepSpeed JSON")
    for flag in ("reset_optimizer", "reset_data"):
        if getattr(found, flag) and found.resume is None:
            parser.error(f"--{flag.replace('_', '-')} says what --resume keeps: give --resume too")
    if found.save is None:
        found.save = found.output / "checkpoints"
    return found


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", type=path, required=True, help="a LlamaConfig JSON, or a Hugging Face folder to continue from"
    )
    group.add_argument(
        "--data", type=word, default="stdlib", help="stdlib, a file, a folder, hf:NAME[:CONFIG] or megatron:PREFIX"
    )
    group.add_argument(
        "--tokenizer",
        type=word,
        help="bpe (trained on the data; the default for text with a new model), bytes, or a folder or hub name",
    )
    group.add_argument("--vocab-size", type=positive, default=4096, help="vocabulary size of a bpe tokenizer")
    group.add_argument("--sequence-length", type=positive, default=256, help="tokens per sequence")
    group.add_argument("--cache", type=path, default=CACHE, metavar="DIR", help="tokenizers and tokenized text")


def add_run(group: argparse._ArgumentGroup) -> None:
    """Add the arguments for how a run trains, except for its length and evaluation."""
    group.add_argument("--global-batch-size", type=positive, help="overrides train_batch_size of the JSON")
    group.add_argument("--micro-batch-size", type=positive, help="overrides train_micro_batch_size_per_gpu of the JSON")
    group.add_argument("--lr", type=rate, help="overrides optimizer.params.lr of the JSON")
    group.add_argument(
        "--matrix-lr-scale", type=rate, help="dense optimizers and VLoRP: factor on the lr of the layers' matrices"
    )
    group.add_argument(
        "--warmup", type=rate, default=0.1, help="fraction or number of the steps; unused if the JSON has a scheduler"
    )
    group.add_argument("--seed", type=seed, default=0, help="seed of weights and data order")
    group.add_argument("--activation-checkpointing", action="store_true", help="recompute activations to save memory")
    group.add_argument(
        "--timeout", type=seconds, default=TIMEOUT, metavar="SECONDS", help="how long to wait for a rank that is silent"
    )
    group.add_argument(
        "--setup-timeout",
        type=seconds,
        default=SETUP_TIMEOUT,
        metavar="SECONDS",
        help="the same before the second step, and while files are written; --timeout if that is longer",
    )
    group.add_argument(
        "--join-timeout", type=seconds, default=45.0, metavar="SECONDS", help="how long to wait for a rank at the start"
    )
    group.add_argument(
        "--stop-on",
        type=condition,
        action=OneOfEachKind,
        nargs="+",
        metavar="CONDITION",
        help="end the run with an error: nan:K, loss:X[:M], grad-norm:X[:M], as docs/reliability.md says",
    )


def add_outputs(group: argparse._ArgumentGroup) -> None:
    """Add the arguments for what a run writes."""
    group.add_argument("--output", type=path, required=True, metavar="DIR", help="metrics, plot, summary, export")
    group.add_argument("--log-interval", type=positive, default=10, help="in steps")
    group.add_argument(
        "--update-ratio", action="store_true", help="log how far a step moves the matrices; copies a stack of weights"
    )
    group.add_argument("--save", type=path, metavar="DIR", help="checkpoints; OUTPUT/checkpoints by default")
    group.add_argument("--save-interval", type=count, default=1000, help="in steps; 0 saves only when asked to stop")
    group.add_argument("--keep-checkpoints", type=positive, default=2, help="how many of the newest to keep")
    group.add_argument(
        "--resume", nargs="?", const="", metavar="TAG_OR_PATH", help="continue from the newest checkpoint, or this one"
    )
    group.add_argument(
        "--start-from",
        type=path,
        metavar="CHECKPOINT",
        help="a new run begins with the weights of a checkpoint, and the moments of what AdamW steps there and here",
    )
    group.add_argument(
        "--reset-optimizer",
        nargs="?",
        const="all",
        choices=["settings", "projected", "all"],
        help="with --resume: allow other options of the optimizer (settings: its state is kept), or another rank or "
        "method (projected: the moments of what AdamW steps are kept; all: none); weights, data and step are kept",
    )
    group.add_argument(
        "--reset-data",
        action="store_true",
        help="with --resume: allow other data, batch or sequence length; weights, optimizer and step are kept",
    )
    group.add_argument(
        "--synchronous-save",
        action="store_true",
        help="wait until a checkpoint is on the disk, instead of writing it from a copy in memory while training",
    )
    group.add_argument("--export", action="store_true", help="write a Hugging Face folder, OUTPUT/export, at the end")


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    return _whole(text, 1)


def count(text: str) -> int:
    """Argument type: a whole number of at least 0."""
    return _whole(text, 0)


def seed(text: str) -> int:
    """Argument type: a whole number of at least 0 that random generators take as a seed."""
    return _whole(text, 0, 2**63 - 1)


def rate(text: str) -> float:
    """Argument type: a finite number of at least 0."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def number(text: str) -> float:
    """Argument type: a finite number."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII) or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return float(text)


def seconds(text: str) -> float:
    """Argument type: a time above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def word(text: str) -> str:
    """Argument type: a text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a value, or leave the flag out")
    return text


def path(text: str) -> Path:
    """Argument type: the path of a file or folder. An empty one would be the current folder."""
    return Path(word(text))


def _whole(text: str, least: int, most: int = LARGEST) -> int:
    value = int(text) if re.fullmatch(r"-?\d{1,20}", text, re.ASCII) else least - 1
    if not least <= value <= most:
        limit = f" and at most {most}" if value > most or most != LARGEST else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}{limit}")
    return value
