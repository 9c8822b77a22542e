"""A model without weights, to know what a checkpoint's weights are in it: parameters, buffers and names for the same.

A checkpoint has logical matrices. A parameter is one of them, or it consists of several: a stack of experts, a fused
weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ds_lowrank.errors import CheckpointError, ConfigError
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.parameter_names import tag_names, tag_parameters
from ds_lowrank.placement.tensor_parallel import logical_matrices
from ds_lowrank.sharding.logical import Logical
from ds_lowrank.sharding.pieces import Piece, Source

LORA = "lora_rank"


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a model.

    Args:
        path: a Hugging Face folder, or a JSON file like its config.json.

    Raises:
        ConfigError: it cannot be read.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {file} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: {file} is not the configuration of a model")
    return found


def build(config: Mapping[str, Any]) -> Any:
    """The model of a configuration, on the meta device.

    Args:
        config: as in config.json, with ``task`` for a run of launch/finetune.py. Without ``model_type`` it is a LLaMA.

    Raises:
        ConfigError: transformers cannot build it.
    """
    entries = dict(config)
    if LORA in entries:
        raise ConfigError(
            "the checkpoint has LoRA factors beside the weights: launch/finetune.py --export merges and exports them"
        )
    task = entries.pop("task", "causal-lm")
    auto = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    named = [name for name in entries.get("architectures") or [] if hasattr(transformers, name)]
    try:
        full = AutoConfig.for_model(entries.pop("model_type", "llama"), **entries)
        with torch.device("meta"):
            return getattr(transformers, named[0])(full) if named else auto.from_config(full)
    except Exception as error:  # whatever transformers says about a configuration
        raise ConfigError(f"transformers cannot build the model: {' '.join(str(error).split())[:300]}") from error


class Skeleton:
    """What a model's state consists of.

    Args:
        model: on the meta device.

    Attributes:
        shapes: of every parameter, by its name.
        buffers: names of the buffers in its state.
        same: further names of parameters, as of a tied head: the first name for each.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        tag_parameters(model)
        names, grid = tag_names(model), Grid()
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._matrices: dict[str, list[Logical]] = {}
        for name, parameter in model.named_parameters():
            self.shapes[name] = tuple(parameter.shape)
            self._matrices[name] = logical_matrices(parameter, tuple(parameter.shape), names[name], grid)
        self.same = {
            name: first[id(parameter)]
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if name != first[id(parameter)]
        }
        parameters = {*self.shapes, *self.same}
        self.buffers = [name for name in model.state_dict() if name not in parameters]

    def matrices(self, name: str) -> list[Logical]:
        """The logical matrices that a parameter consists of.

        Args:
            name: of the parameter.
        """
        return self._matrices[name]

    def check(self, source: Source, names: list[str]) -> None:
        """Check that a checkpoint has the weights of this model, and no others.

        Args:
            source: what was saved.
            names: of its weights.

        Raises:
            CheckpointError: it is a checkpoint of another model.
        """
        wanted = {one.name: one.shape for matrices in self._matrices.values() for one in matrices}
        missing = sorted(({*wanted} | {*self.buffers}) - set(names))
        extra = sorted(set(names) - {*wanted, *self.buffers})
        if missing or extra:
            what = f"has no {missing[0]}" if missing else f"has {extra[0]}, which this model has not"
            more = max(len(missing), len(extra)) - 1
            raise CheckpointError(
                f"the checkpoint {what}" + (f" ({more} more differ)" if more else "") + ": give the --config of its "
                "model"
            )
        for name, shape in wanted.items():
            if tuple(source.shape(name)) != shape:
                raise CheckpointError(
                    f"{name} is {tuple(source.shape(name))} in the checkpoint and {shape} by the configuration: give "
                    "the --config of its model"
                )

    def read(self, name: str, source: Source, out: torch.Tensor) -> None:
        """Read a parameter as the model has it.

        Args:
            name: of the parameter.
            source: what was saved.
            out: where to put it: contiguous, any dtype, on the CPU.
        """
        flat = out.view(-1)
        for one in self._matrices[name]:
            rectangles = one.part(one.own, 0, flat.numel()).rectangles
            spans = one.spans(0, flat.numel())
            if len(spans) == 1:
                source.read(one.name, rectangles, flat[slice(*spans[0])])
                continue
            found = torch.empty(sum(hi - lo for lo, hi in spans), dtype=out.dtype, device="cpu")
            source.read(one.name, rectangles, found)
            for span, part in zip(spans, torch.split(found, [hi - lo for lo, hi in spans]), strict=True):
                flat[slice(*span)] = part

    def pieces(self, name: str, values: torch.Tensor, key: str = "") -> Iterator[Piece]:
        """A parameter, or its moments, as a checkpoint has them.

        Args:
            name: of the parameter.
            values: of its shape.
            key: appended to the matrices' names.
        """
        flat = values.reshape(-1)
        for one in self._matrices[name]:
            rectangles = one.part(one.own, 0, flat.numel()).rectangles
            data = torch.cat([flat[slice(*span)] for span in one.spans(0, flat.numel())])
            yield Piece(one.name + key, one.shape, rectangles, data)
