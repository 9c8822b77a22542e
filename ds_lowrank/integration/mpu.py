"""The grid that DeepSpeed and megatron-core agree on."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ds_lowrank.environment.apex import check_apex
from ds_lowrank.environment.packages import is_importable
from ds_lowrank.errors import ConfigError

MISSING = (
    "megatron-core is not installed, and tensor and pipeline parallelism are made of its layers: pip install "
    "megatron-core==0.16.1. tensor_parallel.autotp_size works without"
)


class MegatronMPU:
    """megatron-core's ``parallel_state`` as the ``mpu`` of ``deepspeed.initialize``.

    The module itself lacks the rank and the size of the model-parallel group, which DeepSpeed asks for.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._state.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._state.get_model_parallel_group())


def as_mpu(mpu: Any) -> Any:
    """An mpu as DeepSpeed can use it: megatron-core's ``parallel_state`` is wrapped, anything else left as it is.

    Raises:
        ConfigError: an apex that is not NVIDIA's has misled megatron-core.
    """
    if hasattr(mpu, "get_model_parallel_rank") or not hasattr(mpu, "get_tensor_model_parallel_group"):
        return mpu
    check_apex()
    return MegatronMPU(mpu)


def check_grid(world: int, tensor: int, pipeline: int, megatron: bool = True) -> None:
    """Refuse a grid that the ranks do not fill, a missing megatron-core, and an apex that would mislead it.

    Args:
        megatron: whether it is made of megatron-core's layers.

    Raises:
        ConfigError: says what to change.
    """
    if megatron and tensor * pipeline > 1:
        if not is_importable("megatron.core"):
            raise ConfigError(MISSING)
        check_apex()
    if world % (tensor * pipeline):
        raise ConfigError(
            f"{world} ranks are no multiple of tensor-parallel {tensor} x pipeline-parallel {pipeline} = "
            f"{tensor * pipeline}: start more ranks, or split less"
        )


def make_grid(tensor: int, pipeline: int) -> Any:
    """Initialise megatron-core's groups, or take those that are there; ``torch.distributed`` must be. Collective.

    Returns:
        The mpu, for ``initialize`` (a ``PipelineModule`` brings its own).
    """
    check_grid(dist.get_world_size(), tensor, pipeline)
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if found != (tensor, pipeline):
        raise ConfigError(
            f"megatron-core's groups are there already, for tensor x pipeline {found}, not {(tensor, pipeline)}: call "
            "megatron.core.parallel_state.destroy_model_parallel() first"
        )
    return MegatronMPU(parallel_state)
