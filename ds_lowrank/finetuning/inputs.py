"""The data of a fine-tuning run: rows, task and tokenizer combined into examples that fit the model."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from ds_lowrank.collectives import broadcast_from_rank0, raise_on_all_ranks
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.example_tokenizer import ExampleTokenizer, load_example_tokenizer
from ds_lowrank.data.examples import Example, fingerprint
from ds_lowrank.data.records import Row
from ds_lowrank.data.rows import USUAL, Splits, open_rows
from ds_lowrank.data.vocabulary import check_id
from ds_lowrank.finetuning.causal_lm import CausalLM
from ds_lowrank.finetuning.generation import check_answers
from ds_lowrank.finetuning.metrics import LOWER_IS_BETTER
from ds_lowrank.finetuning.model import Source
from ds_lowrank.finetuning.tasks import Task, make_task


@dataclass(frozen=True)
class Inputs:
    """The opened data of a run.

    Attributes:
        task: the task.
        tokenizer: the tokenizer.
        train: the training examples.
        validation: the examples of each validation split, keyed by the prefix of its metrics.
        pad_id: the id that pads short examples.
        best_metric: the name of the metric that decides which model is best.
    """

    task: Task
    tokenizer: ExampleTokenizer
    train: list[Example]
    validation: dict[str, list[Example]]
    pad_id: int
    best_metric: str


def open_inputs(arguments: Namespace, source: Source) -> Inputs:
    """Read, check and encode the data. Collective; if one rank fails, all raise.

    Args:
        arguments: the command line of launch/finetune.py.
        source: the model to fine-tune.

    Raises:
        DataError: the data cannot be used, do not fit the model, or differ between the ranks.
    """
    splits = Splits(arguments.train_split or USUAL.train, arguments.validation_split or USUAL.validation)
    rows = open_rows(arguments.data, arguments.validation, arguments.held_out, arguments.seed, splits)
    with raise_on_all_ranks():
        task = make_task(arguments, rows)
        best_metric = _best_metric(arguments.best_metric, task)
    spec = arguments.tokenizer
    if spec is None:
        spec = "bpe" if source.random else source.name
    tokenizer = load_example_tokenizer(spec, task.texts(rows.train), source.vocab_size, arguments.cache)
    with raise_on_all_ranks():
        _check_length(arguments.max_length, source, tokenizer)
        segments = getattr(source.config, "type_vocab_size", 0) > 1

        def encode(part: list[Row]) -> list[Example]:
            examples = task.encode(part, tokenizer, arguments.max_length, segments)
            for row, example in zip(part, examples, strict=True):
                check_id(int(example.input_ids.max()), source.vocab_size, row.where, tokenizer.decode)
            return examples

        train = encode(rows.train)
        validation = {prefix: encode(part) for prefix, part in rows.validation.items()}
        if isinstance(task, CausalLM) and task.generation is not None:
            for prefix, part in rows.validation.items():
                named = task.template.answered_in
                check_answers(task.generation, part, validation[prefix], named, source.longest)
        pad_id = _pad_id(source, tokenizer)
        if len({len(example.input_ids) for part in (train, *validation.values()) for example in part}) > 1:
            check_id(pad_id, source.vocab_size, "the padding of shorter examples", tokenizer.decode)
    own = [fingerprint(part) for part in (train, *validation.values())]
    first = broadcast_from_rank0(lambda: own)
    with raise_on_all_ranks():
        if own != first:
            raise DataError(
                "the examples differ between the ranks of this job; give every node the same files and packages"
            )
    return Inputs(task, tokenizer, train, validation, pad_id, best_metric)


def _best_metric(chosen: str | None, task: Task) -> str:
    known = (*task.metrics, *(name for name in LOWER_IS_BETTER if name == "loss"))
    if chosen is not None and chosen not in known:
        raise DataError(f"--best-metric {chosen}: this task measures {', '.join(known)}")
    return chosen or known[0]


def _check_length(max_length: int, source: Source, tokenizer: ExampleTokenizer) -> None:
    for longest, what in ((source.longest, "the model"), (tokenizer.max_length, "the tokenizer")):
        if longest is not None and max_length > longest:
            raise DataError(f"--max-length {max_length} is above the limit of {longest} tokens of {what}: lower it")


def _pad_id(source: Source, tokenizer: ExampleTokenizer) -> int:
    """The model's own padding id, by which it finds the end of a text, else the tokenizer's. -1 also means none."""
    own = source.config.get_text_config().pad_token_id
    return int(own) if own is not None and own >= 0 else tokenizer.pad_id
