"""Over how many ranks a run splits what: data x tensor x pipeline."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig

from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.mpu import check_grid
from ds_lowrank.integration.unsupported_settings import autotp_size, check_stage
from ds_lowrank.models.llama import check_split
from ds_lowrank.training.config import GLOBAL


@dataclass(frozen=True)
class GridShape:
    """``autotp``: DeepSpeed's own tensor parallelism, instead of megatron-core's ``tensor``."""

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    autotp: int = 1

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // (self.tensor_ranks * self.pipeline)

    @property
    def tensor_ranks(self) -> int:
        """Over how many ranks a layer is split, by whichever of the two."""
        return self.tensor * self.autotp

    def data_rank(self, rank: int) -> int:
        """Which of them a rank is: tensor-parallel ranks lie side by side, stages farthest apart."""
        return rank % (self.data * self.tensor_ranks) // self.tensor_ranks

    @property
    def uses_megatron(self) -> bool:
        return self.tensor * self.pipeline > 1


def grid_shape(arguments: Namespace, config: dict[str, Any], model: LlamaConfig, ranks: int) -> GridShape:
    """The grid that flags and configuration ask for.

    Raises:
        ConfigError: it cannot be had; says what to change.
    """
    autotp = autotp_size(config)
    shape = GridShape(ranks, arguments.tensor_parallel, arguments.pipeline_parallel, autotp)
    if autotp > 1 and shape.uses_megatron:
        raise ConfigError(
            "tensor_parallel.autotp_size splits Hugging Face's layers, --tensor-parallel and --pipeline-parallel are "
            "made of megatron-core's: use one of them"
        )
    check_grid(ranks, shape.tensor_ranks, shape.pipeline, megatron=shape.uses_megatron)
    check_split(model, shape.tensor_ranks, shape.pipeline)
    check_stage(config, shape.tensor_ranks, shape.pipeline > 1)
    if arguments.sequence_parallel:
        _check_sequence_parallel(shape, arguments.sequence_length)
    return shape


def _check_sequence_parallel(shape: GridShape, length: int) -> None:
    if shape.tensor == 1:
        raise ConfigError(
            "--sequence-parallel shares the sequence out over tensor-parallel ranks: give --tensor-parallel"
        )
    if length % shape.tensor:
        raise ConfigError(f"--sequence-length {length} is no multiple of --tensor-parallel {shape.tensor}: change one")
    if get_accelerator().device_name() == "cpu":
        raise ConfigError(
            "--sequence-parallel needs a GPU, as megatron-core's collectives for it ask for CUDA: leave it out"
        )


def without_global_size(config: dict[str, Any], shape: GridShape) -> dict[str, Any]:
    """The configuration for DeepSpeed, which under AutoTP takes every rank for a data-parallel one when it checks."""
    return config if shape.autotp == 1 else {key: value for key, value in config.items() if key != GLOBAL}
