"""Reading the weights of a LLaMA from a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class FolderWeights:
    """The weights in a Hugging Face folder's safetensors files, read one at a time.

    An instance is a ``WeightSource``: call it with the name and shape of a parameter.

    Args:
        folder: the Hugging Face folder.
        config: sizes of the LLaMA that the weights are for.

    Raises:
        ValueError: a file or weights are missing, or have other shapes. This is checked before any weight is read.
    """

    def __init__(self, folder: Path, config: LlamaConfig) -> None:
        self._files = {name: file for file in _opened(folder) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            needed = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
        missing = sorted(needed.keys() - self._files.keys())
        if missing:
            raise ValueError(
                f"--model {folder} has no weights for {len(missing)} parameters of a LlamaForCausalLM, the first is "
                f"{missing[0]}: give the folder of a language model, or a LlamaConfig JSON for new weights"
            )
        for name, shape in needed.items():
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != shape:
                raise ValueError(f"--model {folder}: {name} is {found} in the weights, but {shape} by config.json")

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one weight, on the CPU, in the dtype in which it is stored."""
        weight: Tensor = self._files[name].get_tensor(name)
        return weight.view(shape)


def _opened(folder: Path) -> list[Any]:
    """The opened files. Only their headers are read; weights are read on request."""
    index = folder / INDEX
    try:
        entries = json.loads(index.read_bytes())["weight_map"] if index.is_file() else {"": SINGLE}
        files = list(dict.fromkeys(entries.values()))
        for file in files:
            if not (folder / file).is_file():
                advice = f"{INDEX} names it" if index.is_file() else "save the model with transformers' save_pretrained"
                raise ValueError(f"--model {folder} has no {file}: {advice}")
        return [safe_open(folder / file, framework="pt") for file in files]
    except (SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"--model {folder}: the weights cannot be read ({error})") from error
