"""The command line of launch/finetune.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ds_lowrank.data.built_in import BUILT_IN, FUNCTIONS
from ds_lowrank.finetuning.answers import MATCHES
from ds_lowrank.finetuning.presets import PRESETS
from ds_lowrank.finetuning.templates import NAMED
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
    _add_prompts(parser.add_argument_group("prompts and answers, for a causal language model"))
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
    found = _with_preset(parser, arguments)
    _check(parser, found)
    return found


def _with_preset(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, with the flags that a task's name stands for as defaults."""
    found = parsed(parser, arguments)
    preset = PRESETS.get(found.task)
    if preset is None:
        return found
    if found.prompt_column is not None or found.text_column is not None:
        parser.error(f"--task {found.task} has a template: leave --prompt-column and --text-column out")
    parser.set_defaults(**(preset.data if found.data == FUNCTIONS else {}), **preset.other)
    found = parsed(parser, arguments)
    found.task = "causal-lm"
    return found


def _check(parser: argparse.ArgumentParser, found: argparse.Namespace) -> None:
    if not found.data.startswith("hf:") and (found.train_split or found.validation_split):
        parser.error("--train-split and --validation-split are for --data hf:NAME")
    if found.text_column is not None and len(found.text_column) > 2:
        parser.error("--text-column takes one column, or two for pairs of texts")
    if found.lora_alpha == 0:
        parser.error("--lora-alpha must be above 0: with 0 the factors have no effect")
    if not 0 < found.held_out < 1:
        parser.error("--held-out must be a fraction between 0 and 1")
    _check_prompts(parser, found)


def _check_prompts(parser: argparse.ArgumentParser, found: argparse.Namespace) -> None:
    if (found.prompt_column is None) != (found.completion_column is None):
        parser.error("--prompt-column and --completion-column belong together")
    if found.prompt_column is not None and found.task != "causal-lm":
        parser.error("--prompt-column and --completion-column are for --task causal-lm")
    if found.template is not None and found.prompt_column is not None:
        parser.error("--template and --prompt-column both say what the prompt is: give one of them")
    needing = {"--template": found.template, "--chat": found.chat, "--max-new-tokens": found.max_new_tokens}
    for flag in (flag for flag, given in needing.items() if given):
        if found.task != "causal-lm":
            parser.error(f"{flag} is for --task causal-lm: a classifier neither reads prompts nor generates answers")
        if found.template is None and found.prompt_column is None:
            parser.error(f"{flag} needs prompts: give --template, or --prompt-column and --completion-column")
    if found.match is not None and found.max_new_tokens is None:
        parser.error("--match compares generated answers: give --max-new-tokens too")
    found.match = found.match or "text"


def _add_inputs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", type=word, required=True, help="Hugging Face folder or hub name, or a LlamaConfig JSON"
    )
    group.add_argument("--task", choices=("classification", "causal-lm", *PRESETS), default="classification")
    group.add_argument(
        "--data", type=word, default=FUNCTIONS, help=f"{', '.join(BUILT_IN)}, a file, glue:TASK or hf:NAME[:CONFIG]"
    )
    group.add_argument("--validation", type=path, metavar="FILE", help="validation examples, if --data is a file")
    group.add_argument("--train-split", type=word, metavar="NAME", help="hf: the split to train on; train by default")
    group.add_argument(
        "--validation-split",
        type=word,
        metavar="NAME",
        help="hf: the split for validation, validation by default, or none to hold out a part of the other",
    )
    group.add_argument(
        "--held-out", type=number, default=0.1, help="fraction of a single file or split that is used for validation"
    )
    group.add_argument(
        "--text-column",
        type=word,
        nargs="+",
        metavar="NAME",
        help="one, or two for pairs; by default those of a task by name, else text",
    )
    group.add_argument(
        "--label-column", type=word, default="label", metavar="NAME", help="column of classes or numbers"
    )
    group.add_argument("--tokenizer", type=word, help="bpe, bytes, or a folder or hub name; by default the model's")
    group.add_argument("--max-length", type=positive, default=256, help="tokens per example; longer ones are truncated")
    group.add_argument("--cache", type=path, default=CACHE, metavar="DIR", help="trained tokenizers")


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt-column", type=word, metavar="NAME", help="column that is read but not learnt")
    group.add_argument("--completion-column", type=word, metavar="NAME", help="column that is learnt")
    group.add_argument(
        "--template", type=word, metavar="NAME_OR_FILE", help=f"instead of columns: a JSON file, or {', '.join(NAMED)}"
    )
    group.add_argument("--chat", action="store_true", help="put prompt and answer into the tokenizer's chat template")
    group.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help="generate answers of at most N tokens at evaluations"
    )
    group.add_argument("--match", choices=tuple(MATCHES), help="what is compared of generated answers; text by default")


def _add_lora(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lora-rank", type=positive, help="train LoRA of this rank with peft")
    group.add_argument(
        "--lora-alpha", type=rate, default=16.0, help="the product of the factors is scaled by alpha / rank"
    )
    group.add_argument(
        "--lora-targets", type=word, nargs="+", metavar="NAME", help="module names; every linear layer by default"
    )
