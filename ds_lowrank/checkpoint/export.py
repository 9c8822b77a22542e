"""Exporting a trained model as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from deepspeed import DeepSpeedEngine
from transformers import LlamaForCausalLM

from ds_lowrank.adapters import lora
from ds_lowrank.adapters.model import merged_weights
from ds_lowrank.checkpoint.gather import whole_weights
from ds_lowrank.checkpoint.owned import delete_owned, make_owned, replace_owned
from ds_lowrank.collectives import global_rank, raise_on_all_ranks


class Savable(Protocol):
    """Something that belongs to a model and can write its own files, such as a tokenizer."""

    def save(self, directory: Path) -> None:
        """Write the files into an existing folder."""


def export(
    engine: DeepSpeedEngine, tokenizer: Savable | None, directory: Path, notes: Mapping[str, str] | None = None
) -> None:
    """Write config.json, model.safetensors in the training dtype, and the tokenizer, replacing an earlier export.

    Adapters and LoRA are merged and shards are joined, so that the folder has the original architecture. Parameters are
    gathered one at a time, and only rank 0 keeps them. Collective; an error on rank 0 is raised on all ranks and leaves
    an earlier export unchanged.

    Args:
        engine: the engine of the trained model.
        tokenizer: the tokenizer, or None to write none.
        directory: the folder to write.
        notes: further files to write: their text, keyed by file name.

    Raises:
        OSError: on rank 0, the folder cannot be written, or there is one that this package did not write.
        RemoteError: on the other ranks, if rank 0 failed.
    """
    model, weights = engine.module, whole_weights(engine)
    if hasattr(model, "logical_names"):
        with torch.device("meta"):
            model = LlamaForCausalLM(model.config)
    if lora.has_lora(model):
        model, weights = lora.merge(model, weights)
    with raise_on_all_ranks():
        if global_rank() == 0:
            aside = directory.with_name(f".{directory.name}.partial")
            delete_owned(aside)
            make_owned(aside)
            model.save_pretrained(aside, state_dict=merged_weights(model, weights))
            if tokenizer is not None:
                tokenizer.save(aside)
            for name, text in (notes or {}).items():
                (aside / name).write_text(text)
            replace_owned(aside, directory)
