"""Weights as a Hugging Face folder, written by transformers from tensors that need no memory of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from ds_lowrank.checkpoint.outgoing import Outgoing, written_aside
from ds_lowrank.checkpoint.saved import Saved
from ds_lowrank.checkpoint.skeleton import Skeleton
from ds_lowrank.checkpoint.spool import spooled
from ds_lowrank.errors import ConfigError


def to_huggingface(
    saved: Saved, model: Any, out: Path, *, dtype: torch.dtype, tokenizer: str | None = None, shard: str = "5GB"
) -> None:
    """Write config.json, safetensors files of at most a size, and the tokenizer.

    Args:
        saved: the open checkpoint.
        model: transformers' model of it, on the meta device.
        out: the folder to make.
        dtype: of the weights.
        tokenizer: a folder or name of a tokenizer to save with it; None for none.
        shard: the most bytes of one file, as transformers reads them.

    Raises:
        CheckpointError: the checkpoint is of another model, or there is such a folder.
        ConfigError: the tokenizer or the size cannot be read.
        OSError: it cannot be written.
    """
    weights = Outgoing(saved, Skeleton(model))
    words = _tokenizer(tokenizer) if tokenizer else None
    model.config.dtype = dtype
    with written_aside(out) as aside:
        state: dict[str, torch.Tensor] = {}
        for name, shape in weights.parameters.items():
            state[name] = spooled(math.prod(shape), dtype, aside).view(shape)
            weights.read(name, state[name])
        state |= {name: weights.whole(name) for name in weights.buffers}
        logging.disable_progress_bar()
        model.save_pretrained(aside, state_dict=state, max_shard_size=shard)
        if words is not None:
            words.save_pretrained(aside)
        del state


def _tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever transformers and the hub's client say
        raise ConfigError(f"--tokenizer {name} cannot be read: {' '.join(str(error).split())[:300]}") from error
