"""The command line of launch/finetune.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ds_lowrank.data.rows import FUNCTIONS
from ds_lowrank.training.arguments import (
    CACHE,
    add_outputs,
    add_run,
    count,
    number,
    parsed,
    path,
    positive,
    rate,
    script_parser,
    word,
)
from ds_lowrank.training.schedule import SCHEDULES

EPOCHS = 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of launch/finetune.py.

    Args:
        arguments: the arguments; None for those of the process. Errors end the process with a usage message.
    """
    parser = script_parser("Fine-tune a Hugging Face checkpoint with the optimizer that the configuration names.")
    _add_inputs(parser.add_argument_group("model and data"))
    _add_lora(parser.add_argument_group("LoRA, as a baseline"))
    run = parser.add_argument_group("run")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, default=EPOCHS, help="passes over the training examples")
    length.add_argument("--steps", type=positive, help="total number of optimizer steps, instead of epochs")
    add_run(run)
    run.add_argument(
        "--schedule",
        choices=tuple(SCHEDULES),
        default="cosine",
        help="decay after the warm-up: cosine to a tenth, or linear to zero",
    )
    run.add_argument("--eval-interval", type=count, help="in steps; once per epoch by default, 0 for the end only")
    run.add_argument(
        "--best-metric",
        type=word,
        metavar="NAME",
        help="decides which model is kept; by default the task's first metric",
    )
    add_outputs(parser.add_argument_group("output"))
    found = parsed(parser, arguments)
    if (found.prompt_column is None) != (found.completion_column is None):
        parser.error("--prompt-column and --completion-column belong together")
    if found.prompt_column is not None and found.task != "causal-lm":
        parser.error("--prompt-column and --completion-column are for --task causal-lm")
    if found.text_column is not None and len(found.text_column) > 2:
        parser.error("--text-column takes one column, or two for pairs of texts")
    if found.lora_alpha == 0:
        parser.error("--lora-alpha must be above 0: with 0 the factors have no effect")
    if not 0 < found.held_out < 1:
        parser.error("--held-out must be a fraction between 0 and 1")
    return found


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", type=word, required=True, help="Hugging Face folder or hub name, or a LlamaConfig JSON"
    )
    group.add_argument("--task", choices=("classification", "causal-lm"), default="classification")
    group.add_argument(
        "--data", type=word, default=FUNCTIONS, help=f"{FUNCTIONS}, a file, glue:TASK or hf:NAME[:CONFIG]"
    )
    group.add_argument("--validation", type=path, metavar="FILE", help="validation examples, if --data is a file")
    group.add_argument(
        "--held-out", type=number, default=0.1, help="fraction of a single file that is used for validation"
    )
    group.add_argument(
        "--text-column",
        type=word,
        nargs="+",
        metavar="NAME",
        help="one, or two for pairs; by default the GLUE task's, else text",
    )
    group.add_argument(
        "--label-column", type=word, default="label", metavar="NAME", help="column of classes or numbers"
    )
    group.add_argument(
        "--prompt-column", type=word, metavar="NAME", help="causal-lm: column that is read but not learnt"
    )
    group.add_argument("--completion-column", type=word, metavar="NAME", help="causal-lm: column that is learnt")
    group.add_argument("--tokenizer", type=word, help="bpe, bytes, or a folder or hub name; by default the model's")
    group.add_argument("--max-length", type=positive, default=256, help="tokens per example; longer ones are truncated")
    group.add_argument("--cache", type=path, default=CACHE, metavar="DIR", help="trained tokenizers")


def _add_lora(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lora-rank", type=positive, help="train LoRA of this rank with peft")
    group.add_argument(
        "--lora-alpha", type=rate, default=16.0, help="the product of the factors is scaled by alpha / rank"
    )
    group.add_argument(
        "--lora-targets", type=word, nargs="+", metavar="NAME", help="module names; every linear layer by default"
    )
