"""The weights of a LLaMA in a Hugging Face folder."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class FolderWeights:
    """What a Hugging Face folder has in its safetensors, one weight at a time, in the dtype in which it is stored.

    Raises:
        ValueError: the folder has none that fit a LLaMA of this configuration; found before any weight is read.
    """

    def __init__(self, folder: Path, config: LlamaConfig) -> None:
        self._folder = folder
        self._files = self._find()
        with torch.device("meta"):
            needed = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
        missing = sorted(needed.keys() - self._files.keys())
        if missing:
            raise ValueError(
                f"--model {folder} has no weights for {len(missing)} parameters of a LlamaForCausalLM, the first is "
                f"{missing[0]}: give the folder of a language model, or a LlamaConfig JSON for new weights"
            )
        for name, shape in needed.items():
            found = self._shape(name)
            if found != shape:
                raise ValueError(f"--model {folder}: {name} is {found} in the weights, and {shape} by config.json")

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            weight: Tensor = file.get_tensor(name)
            return weight.view(shape)

    def _find(self) -> dict[str, Path]:
        """In which file each weight is."""
        try:
            if (self._folder / INDEX).is_file():
                entries = json.loads((self._folder / INDEX).read_text())["weight_map"]
                return {name: self._folder / file for name, file in entries.items()}
            with safe_open(self._folder / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), self._folder / SINGLE)
        except FileNotFoundError:
            raise ValueError(
                f"--model {self._folder} has no {SINGLE}: save the model with transformers' save_pretrained"
            ) from None
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"--model {self._folder}: the weights cannot be read ({error})") from error

    def _shape(self, name: str) -> tuple[int, ...]:
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--model {self._folder}: {name} cannot be read ({error})") from error
