"""The tasks of GLUE: their text columns, metrics and validation splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task of the GLUE benchmark.

    Attributes:
        columns: the text columns, one or two.
        metrics: names in ``finetuning/metrics.py``; the first decides which checkpoint is best.
        validation: the names of the validation splits, keyed by the prefix of their metrics.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    validation: Mapping[str, str] = field(default_factory=lambda: {"": "validation"})


GLUE = {
    "cola": GlueTask(("sentence",), ("mcc",)),
    "sst2": GlueTask(("sentence",), ("accuracy",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("f1", "accuracy")),
    "stsb": GlueTask(("sentence1", "sentence2"), ("pearson", "spearman")),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("accuracy",),
        {"": "validation_matched", "mismatched_": "validation_mismatched"},
    ),
    "qnli": GlueTask(("question", "sentence"), ("accuracy",)),
    "rte": GlueTask(("sentence1", "sentence2"), ("accuracy",)),
    "wnli": GlueTask(("sentence1", "sentence2"), ("accuracy",)),
}
