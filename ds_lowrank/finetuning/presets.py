"""Tasks by name: the data, template and comparison that ``--task`` stands for. Every flag overrides its part."""

from __future__ import annotations

from typing import Any, NamedTuple

from ds_lowrank.data.rows import NO_SPLIT


class Preset(NamedTuple):
    """What a task's name stands for.

    Attributes:
        data: flags that say where the rows come from; they apply only if ``--data`` is not given.
        other: the other flags.
    """

    data: dict[str, Any]
    other: dict[str, Any]


PRESETS = {
    "gsm8k": Preset(
        {"data": "hf:openai/gsm8k:main", "validation_split": "test"},
        {"template": "question-answer", "match": "number", "max_new_tokens": 256, "max_length": 512},
    ),
    "mmlu": Preset(
        {"data": "hf:cais/mmlu:all", "train_split": "auxiliary_train"},
        {"template": "mmlu", "match": "letter", "max_new_tokens": 4, "max_length": 1024},
    ),
    "commonsense": Preset(
        {"data": "hf:zwhe99/commonsense_170k", "validation_split": NO_SPLIT, "held_out": 0.001},
        {"template": "alpaca", "match": "option", "max_new_tokens": 32},
    ),
}
