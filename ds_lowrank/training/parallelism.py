"""The shape of a run's grid of ranks: data x tensor x pipeline."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig

from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.ds_config.values import autotp_size
from ds_lowrank.integration.mpu import check_grid
from ds_lowrank.integration.unsupported_settings import check_stage
from ds_lowrank.models.llama import check_split
from ds_lowrank.training.config import GLOBAL


@dataclass(frozen=True)
class GridShape:
    """The degrees of parallelism of a run.

    Attributes:
        ranks: the number of ranks in the job.
        tensor: degree of megatron-core's tensor parallelism.
        pipeline: the number of pipeline stages.
        autotp: degree of DeepSpeed's own tensor parallelism; only one of ``tensor`` and ``autotp`` is above 1.
    """

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    autotp: int = 1

    @property
    def data(self) -> int:
        """The number of data-parallel ranks."""
        return self.ranks // (self.tensor_ranks * self.pipeline)

    @property
    def tensor_ranks(self) -> int:
        """The number of ranks that a layer is split over, by either kind of tensor parallelism."""
        return self.tensor * self.autotp

    def data_rank(self, rank: int) -> int:
        """The place of a global rank in data parallelism, 0 to ``data`` - 1.

        Ranks are ordered as (pipeline, data, tensor), with tensor-parallel ranks adjacent.
        """
        return rank % (self.data * self.tensor_ranks) // self.tensor_ranks

    @property
    def uses_megatron(self) -> bool:
        """Whether the model is built from megatron-core's layers."""
        return self.tensor * self.pipeline > 1


def grid_shape(arguments: Namespace, config: dict[str, Any], model: LlamaConfig, ranks: int) -> GridShape:
    """The grid that the command line and the DeepSpeed configuration request.

    Args:
        arguments: the command line of launch/pretrain.py.
        config: the DeepSpeed configuration.
        model: sizes of the model.
        ranks: the number of ranks in the job.

    Raises:
        ConfigError: this grid is impossible or unsupported; the message says what to change.
    """
    autotp = autotp_size(config)
    shape = GridShape(ranks, arguments.tensor_parallel, arguments.pipeline_parallel, autotp)
    if autotp > 1 and shape.uses_megatron:
        raise ConfigError(
            "tensor_parallel.autotp_size splits Hugging Face's layers, but --tensor-parallel and --pipeline-parallel "
            "use megatron-core's: use one of them"
        )
    check_grid(ranks, shape.tensor_ranks, shape.pipeline, megatron=shape.uses_megatron)
    check_split(model, shape.tensor_ranks, shape.pipeline)
    check_stage(config, shape.tensor_ranks, shape.pipeline > 1)
    if arguments.sequence_parallel:
        _check_sequence_parallel(shape, arguments.sequence_length)
    return shape


def _check_sequence_parallel(shape: GridShape, length: int) -> None:
    if shape.tensor == 1:
        raise ConfigError("--sequence-parallel splits the sequence over tensor-parallel ranks: give --tensor-parallel")
    if length % shape.tensor:
        raise ConfigError(
            f"--sequence-length {length} is not a multiple of --tensor-parallel {shape.tensor}: change one"
        )
    if get_accelerator().device_name() == "cpu":
        raise ConfigError(
            "--sequence-parallel needs a GPU, as megatron-core's collectives for it require CUDA: leave it out"
        )


def without_global_size(config: dict[str, Any], shape: GridShape) -> dict[str, Any]:
    """The configuration to pass to DeepSpeed, without the global batch size under AutoTP.

    DeepSpeed's check of that size counts every rank as data-parallel, which is wrong under AutoTP.
    """
    return config if shape.autotp == 1 else {key: value for key, value in config.items() if key != GLOBAL}
