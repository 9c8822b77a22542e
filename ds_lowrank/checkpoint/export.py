"""A trained model as a Hugging Face folder."""

import shutil
from pathlib import Path

import deepspeed
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ds_lowrank.data.tokenizer import TextTokenizer
from ds_lowrank.models.adapter import merged_weights
from ds_lowrank.together import global_rank, together


def export(engine: DeepSpeedEngine, tokenizer: TextTokenizer | None, directory: Path) -> None:
    """Write config.json, model.safetensors in the training dtype, and the tokenizer; replaces an earlier export.

    Adapters are merged: the folder has the original architecture. At ZeRO 3 parameters are gathered one at a time, and
    only rank 0 keeps them. Collective; an error of rank 0 is raised on all ranks and leaves an earlier export as it
    was.
    """
    weights = _gather(engine)
    with together():
        if global_rank() == 0:
            aside = directory.with_name(f".{directory.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            engine.module.save_pretrained(aside, state_dict=merged_weights(engine.module, weights))
            if tokenizer is not None:
                tokenizer.save(aside)
            if directory.exists():
                shutil.rmtree(directory)
            aside.rename(directory)


def _gather(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Whole parameters by name, on the CPU of rank 0, under every ZeRO stage; empty on the other ranks."""
    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if global_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights
