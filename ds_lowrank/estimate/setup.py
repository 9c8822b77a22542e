"""What is to be estimated: a model, a DeepSpeed configuration and a grid, as a training program would read them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.ds_config.values import precision, section, zero_block, zero_stage
from ds_lowrank.integration.projected import check_projected
from ds_lowrank.integration.without_masters import check_storage
from ds_lowrank.models.llama import config_of_folder, load_config
from ds_lowrank.optimizer.options import parse_options
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.training.config import BatchSizes, read_config, set_batch_sizes
from ds_lowrank.training.parallelism import GridShape, grid_shape

ADAMW = "AdamW"
ADAMS = ("adam", "adamw")
"""Types of ``optimizer`` that keep two moments in fp32, in lower case."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """A run that might be started.

    Attributes:
        model: sizes of the model.
        config: the DeepSpeed configuration, validated.
        grid: the degrees of parallelism.
        batch: the batch sizes.
        sequence: tokens of a sequence.
        checkpointing: whether activations are recomputed.
    """

    model: LlamaConfig
    config: Mapping[str, Any]
    grid: GridShape
    batch: BatchSizes
    sequence: int
    checkpointing: bool

    @property
    def zero(self) -> int:
        """The ZeRO stage."""
        return zero_stage(self.config)

    @property
    def method(self) -> str:
        """The method, or ``AdamW``."""
        kind: str = self.config["optimizer"]["type"]
        return kind if kind in OPTIMIZERS else ADAMW

    @property
    def params(self) -> Mapping[str, Any]:
        """``optimizer.params``."""
        found: Mapping[str, Any] = self.config["optimizer"]["params"]
        return found

    @property
    def options(self) -> Any:
        """The method's validated options; None for AdamW."""
        return None if self.method == ADAMW else parse_options(OPTIMIZERS[self.method].method, self.params)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and gradients."""
        return DTYPES[precision(self.config)]

    @property
    def weight(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def accumulator(self) -> int:
        """Bytes of a gradient between micro-batches (``data_types.grad_accum_dtype``)."""
        return 4 if section(self.config, "data_types").get("grad_accum_dtype") == "fp32" else self.weight

    @property
    def zero_settings(self) -> Mapping[str, Any]:
        """``zero_optimization``."""
        return zero_block(self.config)

    @property
    def is_flat(self) -> bool:
        """Whether a rank steps one flat partition: at ZeRO 1 to 3, and in DeepSpeed's ``BF16_Optimizer``."""
        return self.zero > 0 or self.uses_bf16_optimizer

    @property
    def uses_bf16_optimizer(self) -> bool:
        """Whether DeepSpeed takes its ``BF16_Optimizer``, which partitions masters and states, also at ZeRO 0.

        It does in bf16 in a pipeline at ZeRO 0, and at ZeRO 1 with gradients that are accumulated in fp32.
        """
        if self.dtype != torch.bfloat16 or not getattr(self.options, "master_weights", True):
            return False
        return (self.zero == 0 and self.grid.pipeline > 1) or (self.zero == 1 and self.accumulator == 4)

    @property
    def layout_stage(self) -> int:
        """The ZeRO stage that lays out masters and states as this run does."""
        return 1 if self.uses_bf16_optimizer else self.zero

    @property
    def is_projected(self) -> bool:
        """Whether gradients are projected before they are accumulated and summed (``reduction`` ``projected``)."""
        return getattr(self.options, "reduction", "gradient") == "projected"

    @property
    def has_masters(self) -> bool:
        """Whether there are fp32 copies of the weights: not of fp32 weights at ZeRO 0, nor where turned off."""
        if self.zero == 0 and self.weight == 4 and not self.uses_bf16_optimizer:
            return False
        return bool(getattr(self.options, "master_weights", True))

    @property
    def offloads(self) -> bool:
        """Whether masters, gradients in the step and states are in the host's memory (``offload_optimizer``)."""
        return section(self.zero_settings, "offload_optimizer").get("device", "none") not in (None, "none")

    def with_zero(self, **changes: Any) -> Setup:
        """The same run with other settings of ``zero_optimization``."""
        config = deepcopy(dict(self.config))
        config["zero_optimization"] = {**zero_block(config), **changes}
        return replace(self, config=config)

    def with_params(self, **changes: Any) -> Setup:
        """The same run with other options of the optimizer."""
        config = deepcopy(dict(self.config))
        config["optimizer"]["params"] |= changes
        return replace(self, config=config)

    def with_adamw(self) -> Setup:
        """The same run with AdamW."""
        return replace(self, config={**self.config, "optimizer": {"type": ADAMW, "params": {}}})


def check_reduction(config: Mapping[str, Any]) -> None:
    """Refuse projected reduction and weights without masters where an engine would.

    Args:
        config: the DeepSpeed configuration, validated.

    Raises:
        ConfigError: it is such a configuration; the message says what to change.
    """
    method, params = config["optimizer"]["type"], config["optimizer"]["params"]
    check_projected(config, params, method)
    if params.get("master_weights", True) is False:
        check_storage(config)


def read_setup(arguments: Namespace) -> Setup:
    """Read and check the files and sizes of the command line, as a training program does.

    Args:
        arguments: of ``python -m ds_lowrank estimate``.

    Raises:
        ValueError: a setting, a size or a file cannot be used; the message says what to change.
        OSError: a file cannot be read.
    """
    config, path = read_config(arguments.deepspeed_config), Path(arguments.model)
    model = config_of_folder(path) if path.is_dir() else load_config(path)
    kind = config["optimizer"]["type"]
    if kind not in OPTIMIZERS and kind.lower() not in ADAMS:
        raise ConfigError(f"optimizer.type {kind} is not estimated: choose AdamW or one of {', '.join(OPTIMIZERS)}")
    if kind in OPTIMIZERS and parse_options(OPTIMIZERS[kind].method, config["optimizer"]["params"]).adapters:
        raise ConfigError("adapters are not estimated: remove parametrization, or set it to 'full'")
    grid = grid_shape(arguments, config, model, arguments.gpus)
    if grid.autotp > 1:
        raise ConfigError("tensor_parallel.autotp_size is not estimated: give --tensor-parallel, which splits alike")
    check_reduction(config)
    batch = set_batch_sizes(config, grid.data, arguments.global_batch_size, arguments.micro_batch_size)
    sequence = arguments.sequence_length or model.max_position_embeddings
    if sequence > model.max_position_embeddings:
        raise ConfigError(
            f"--sequence-length {sequence} is above max_position_embeddings {model.max_position_embeddings} of "
            f"{arguments.model}: lower it"
        )
    return Setup(model, config, grid, batch, sequence, arguments.activation_checkpointing)
