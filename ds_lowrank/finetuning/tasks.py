"""The fine-tuning tasks: how rows become examples, and how predictions are measured.

``Classification`` and ``CausalLM`` implement the protocol ``Task``, so that the program and the loop do not depend on
the task.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from deepspeed import DeepSpeedEngine

from ds_lowrank.data.built_in import BUILT_IN
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.example_tokenizer import ExampleTokenizer
from ds_lowrank.data.examples import Example, HeldOut
from ds_lowrank.data.glue import GLUE
from ds_lowrank.data.records import Row, checked_text
from ds_lowrank.data.rows import Rows
from ds_lowrank.finetuning.causal_lm import CausalLM
from ds_lowrank.finetuning.evaluation import predictions_of_all
from ds_lowrank.finetuning.generation import Generation
from ds_lowrank.finetuning.labels import Labels, labels_of
from ds_lowrank.finetuning.metrics import measure
from ds_lowrank.finetuning.templates import load_template, of_columns


class Task(Protocol):
    """A fine-tuning task."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics besides the loss. The first decides which checkpoint is best."""

    def texts(self, rows: Sequence[Row]) -> Iterator[str]:
        """Iterate over all texts of the rows, to train a tokenizer on."""

    def encode(
        self, rows: Sequence[Row], tokenizer: ExampleTokenizer, max_length: int, segments: bool
    ) -> list[Example]:
        """Encode rows as examples.

        Args:
            rows: the rows.
            tokenizer: the tokenizer.
            max_length: the most tokens of an example.
            segments: whether token types tell the two texts of a pair apart.

        Raises:
            DataError: a row cannot be used.
        """

    def measure(
        self, engine: DeepSpeedEngine, batches: Sequence[HeldOut], tokenizer: ExampleTokenizer
    ) -> dict[str, float]:
        """Evaluate the model. Collective.

        Args:
            engine: the engine of the model; it is left in training mode.
            batches: this rank's batches; all ranks must have the same number of them.
            tokenizer: the tokenizer of the examples.

        Returns:
            ``loss`` and the metrics over the batches of all ranks, the same numbers on every rank.
        """


@dataclass(frozen=True)
class Classification:
    """Predicting a class or a number for one or two texts.

    Attributes:
        columns: the text columns, one or two.
        label_column: the column of the labels.
        labels: what the labels mean.
        metrics: the names of the metrics besides the loss.
    """

    columns: tuple[str, ...]
    label_column: str
    labels: Labels
    metrics: tuple[str, ...]

    def texts(self, rows: Sequence[Row]) -> Iterator[str]:
        """Iterate over all texts of the rows."""
        return (row[column] for row in rows for column in self.columns)

    def encode(
        self, rows: Sequence[Row], tokenizer: ExampleTokenizer, max_length: int, segments: bool
    ) -> list[Example]:
        """Encode rows as examples with one label each; see :meth:`Task.encode`."""
        columns = [[row[column] for row in rows] for column in self.columns]
        examples = []
        for row, found in zip(rows, tokenizer.encode(columns, max_length, segments), strict=True):
            if not len(found["input_ids"]):
                raise DataError(f"{row.where} has no text in {' and '.join(self.columns)}; remove it")
            label = self.labels.number(row[self.label_column], row.where)
            examples.append(Example(found["input_ids"], label, found.get("token_type_ids")))
        return examples

    def measure(
        self, engine: DeepSpeedEngine, batches: Sequence[HeldOut], tokenizer: ExampleTokenizer
    ) -> dict[str, float]:
        """The loss per example and the metrics; see :meth:`Task.measure`."""
        regression = self.labels.regression

        def predict(logits: torch.Tensor) -> list[float]:
            found: list[float] = (logits.squeeze(-1).float() if regression else logits.argmax(-1)).tolist()
            return found

        loss, predictions, labels = predictions_of_all(engine, batches, predict)
        return {"loss": loss, **measure(self.metrics, predictions, labels)}


def make_task(arguments: Namespace, rows: Rows) -> Task:
    """Make the task that the command line names.

    Args:
        arguments: the command line of launch/finetune.py.
        rows: the rows of the run.

    Raises:
        DataError: a column does not exist or cannot be used for the task.
    """
    glue = GLUE.get(arguments.data.removeprefix("glue:")) if arguments.data.startswith("glue:") else None
    known = glue or BUILT_IN.get(arguments.data)
    columns = tuple(arguments.text_column or (known.columns if known else ("text",)))
    if arguments.task == "causal-lm":
        return _causal_lm(arguments, rows, columns)
    _check_columns(rows, (arguments.label_column,), "--label-column")
    _check_text(rows, columns)
    label_column = arguments.label_column
    labels = labels_of(rows.train, label_column, rows.classes.get(label_column))
    return Classification(columns, label_column, labels, glue.metrics if glue else _metrics(labels))


def _causal_lm(arguments: Namespace, rows: Rows, columns: tuple[str, ...]) -> CausalLM:
    if arguments.template is not None:
        template = load_template(arguments.template)
        template = replace(template, names={**rows.classes, **template.names})
    elif arguments.prompt_column is not None:
        template = of_columns(arguments.prompt_column, arguments.completion_column)
    elif len(columns) == 2:
        raise DataError("causal-lm takes one --text-column, --prompt-column and --completion-column, or a --template")
    else:
        template = of_columns(*columns)
    template.check(rows.train)
    if arguments.max_new_tokens is None:
        return CausalLM(template, arguments.chat)
    return CausalLM(template, arguments.chat, Generation(arguments.max_new_tokens, arguments.match))


def _metrics(labels: Labels) -> tuple[str, ...]:
    if labels.regression:
        return ("pearson", "spearman")
    return ("accuracy", "f1", "mcc") if len(labels.classes) == 2 else ("accuracy", "mcc")


def _check_columns(rows: Rows, columns: Sequence[str], flag: str) -> None:
    for split in (rows.train, *rows.validation.values()):
        for row in split:
            for column in columns:
                if column not in row:
                    raise DataError(
                        f"{row.where} has no column {column!r} (it has: {', '.join(map(str, row))}); name another "
                        f"with {flag}"
                    )


def _check_text(rows: Rows, columns: Sequence[str]) -> None:
    _check_columns(rows, columns, "--text-column")
    for split in (rows.train, *rows.validation.values()):
        for row in split:
            for column in columns:
                checked_text(row[column], f"{row.where}, column {column!r}")
