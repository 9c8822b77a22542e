"""The model to fine-tune: a Hugging Face checkpoint that is checked against the task before its weights are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.models.auto import modeling_auto
from transformers.utils import logging as hugging_face_logging

from ds_lowrank.collectives import global_rank
from ds_lowrank.finetuning.labels import Labels
from ds_lowrank.models import llama

logger = logging.getLogger("ds_lowrank")

KNOWN = {
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
AUTO = {"classification": AutoModelForSequenceClassification, "causal-lm": AutoModelForCausalLM}
LLAMA = {"classification": LlamaForSequenceClassification, "causal-lm": LlamaForCausalLM}
# Their position embeddings start after the padding id.
OFFSET_POSITIONS = (
    *("camembert", "data2vec-text", "esm", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"),
)


@dataclass(frozen=True)
class Source:
    """A model to fine-tune, of which only the configuration has been read.

    Attributes:
        name: a folder or hub name, or the JSON file of a LLaMA with random weights.
        config: Hugging Face's configuration of the model.
        random: whether the weights are random.
    """

    name: str
    config: Any
    random: bool

    @property
    def vocab_size(self) -> int:
        """The number of token embeddings."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def longest(self) -> int | None:
        """The most tokens that the position embeddings allow; None if the configuration does not say."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is None:
            return None
        after_padding = self.config.model_type in OFFSET_POSITIONS
        return int(positions) - (int(self.config.pad_token_id) + 1 if after_padding else 0)


def find_model(name: str, task: str) -> Source:
    """Read the configuration of a checkpoint and check it against the task.

    Args:
        name: a folder or hub name, or a LlamaConfig JSON for random weights.
        task: ``classification`` or ``causal-lm``.

    Raises:
        ValueError: it is not a checkpoint, or not one that can be used for this task.
        FileNotFoundError: there is no such folder or file.
    """
    path = Path(name).expanduser()
    if path.is_file() or name.endswith(".json"):
        return Source(name, llama.load_config(path), random=True)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"--model {name} is not a checkpoint: the folder has no config.json; give a Hugging Face folder (such as "
            "the export of launch/pretrain.py), a hub name, or a LlamaConfig JSON"
        )
    if not path.is_dir() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"--model {name}: no such folder")
    try:
        config = AutoConfig.from_pretrained(os.path.expanduser(name), trust_remote_code=False)
    except Exception as error:  # the hub's client and the validators raise unrelated classes
        cause = " ".join(str(error).split())
        raise ValueError(f"--model {name} cannot be read ({cause}); give a Hugging Face folder or hub name") from error
    _check_architecture(name, config, task)
    return Source(os.path.expanduser(name), config, random=False)


def _check_architecture(name: str, config: Any, task: str) -> None:
    if config.model_type not in KNOWN[task]:
        raise ValueError(f"--model {name} is a {config.model_type!r}, for which transformers has no {task} model")
    architectures = config.architectures or []
    if task == "causal-lm" and architectures and not set(architectures) & set(KNOWN[task].values()):
        raise ValueError(
            f"--model {name} is a {architectures[0]}, which does not predict the next token: use --task classification "
            "or give a decoder's checkpoint"
        )


def build_model(source: Source, task: str, labels: Labels | None, pad_id: int, seed: int, ds_config: Any) -> Any:
    """Build the model in fp32 on the CPU. Its head is new if the checkpoint has none that fits.

    A LLaMA with random weights is partitioned as it is created at ZeRO 3. A new head is drawn from torch's global
    generator, which the caller must have seeded.

    Args:
        source: the model.
        task: ``classification`` or ``causal-lm``.
        labels: the labels of a classification; None for ``causal-lm``.
        pad_id: the id that pads batches.
        seed: seed of random weights.
        ds_config: the DeepSpeed configuration.

    Raises:
        ValueError: the weights cannot be read, or the checkpoint has none for parts of the model's body.
    """
    config = source.config
    if labels is not None:
        names = labels.classes or ("value",)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.num_labels = len(names)
        config.problem_type = "regression" if labels.regression else "single_label_classification"
    config.get_text_config().use_cache = False
    model = llama.build(config, seed, ds_config, LLAMA[task]) if source.random else _load(source, task)
    if labels is not None:
        # Not before, as an embedding that is built with it would keep the gradient of that row at zero.
        config_of_text = model.config.get_text_config()
        config_of_text.pad_token_id = model.config.pad_token_id = pad_id
    return model


def _load(source: Source, task: str) -> Any:
    try:
        with _quiet():
            model, found = AUTO[task].from_pretrained(
                source.name,
                config=source.config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
    except Exception as error:  # safetensors, the hub's client and torch raise unrelated classes
        raise ValueError(f"--model {source.name}: the weights cannot be read ({error})") from error
    new = sorted({*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])})
    body = [name for name in new if task == "causal-lm" or _in_body(name, model.base_model_prefix)]
    if body:
        raise ValueError(
            f"--model {source.name} is not a checkpoint of a {type(model).__name__}: it has no fitting weights for "
            f"{len(body)} parameters, {_some(body)}"
        )
    if new and global_rank() == 0:
        logger.info("new, not from the checkpoint: %s", _some(new))
    return model


def _in_body(name: str, prefix: str) -> bool:
    """Whether a parameter is in the body. A pooler is part of the head, as checkpoints may lack it."""
    return name.startswith(f"{prefix}.") and ".pooler." not in name


def _some(names: Iterable[str]) -> str:
    first, *more = names
    return f"{first} and {len(more)} more" if len(more) > 3 else ", ".join([first, *more])


@contextmanager
def _quiet() -> Any:
    """Silence transformers' own report on missing weights; the errors and the log here replace it."""
    level = hugging_face_logging.get_verbosity()
    hugging_face_logging.set_verbosity_error()
    try:
        yield
    finally:
        hugging_face_logging.set_verbosity(level)
