"""Model-parallel units: megatron-core's grid in the form that DeepSpeed expects."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ds_lowrank.environment.apex import check_apex
from ds_lowrank.environment.packages import is_importable
from ds_lowrank.errors import ConfigError

MISSING = (
    "megatron-core is not installed, but tensor and pipeline parallelism use its layers: pip install "
    "megatron-core==0.16.1. tensor_parallel.autotp_size works without it"
)


class MegatronMPU:
    """megatron-core's ``parallel_state`` as the ``mpu`` of ``deepspeed.initialize``.

    It adds the two functions that DeepSpeed calls and the module lacks; everything else is the module's.

    Args:
        state: the module ``megatron.core.parallel_state``.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_model_parallel_rank(self) -> int:
        """This process's rank in its model-parallel group, which spans tensor and pipeline parallelism."""
        return dist.get_rank(self._state.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """The number of ranks in this process's model-parallel group."""
        return dist.get_world_size(self._state.get_model_parallel_group())


def as_mpu(mpu: Any) -> Any:
    """Wrap megatron-core's ``parallel_state`` for DeepSpeed; anything else is returned unchanged.

    Args:
        mpu: the caller's, or None.

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
        world: the number of ranks.
        tensor: the degree of tensor parallelism.
        pipeline: the number of pipeline stages.
        megatron: whether the model is made of megatron-core's layers.

    Raises:
        ConfigError: the grid cannot be built; the message says what to change.
    """
    if megatron and tensor * pipeline > 1:
        if not is_importable("megatron.core"):
            raise ConfigError(MISSING)
        check_apex()
    if world % (tensor * pipeline):
        raise ConfigError(
            f"{world} ranks are not a multiple of tensor-parallel {tensor} x pipeline-parallel {pipeline} = "
            f"{tensor * pipeline}: start more ranks, or split less"
        )


def make_grid(tensor: int, pipeline: int, timeout: float = 1800.0) -> Any:
    """Initialise megatron-core's process groups, unless they exist. Collective over all ranks.

    ``torch.distributed`` must be initialised before.

    Args:
        tensor: the degree of tensor parallelism.
        pipeline: the number of pipeline stages.
        timeout: the time limit of the groups' collectives in seconds, also for making the groups.

    Returns:
        The ``mpu`` for :func:`ds_lowrank.initialize`. A ``PipelineModule`` does not need it.

    Raises:
        ConfigError: the ranks do not fill the grid, megatron-core is missing, or its groups exist with other sizes.
    """
    check_grid(dist.get_world_size(), tensor, pipeline)
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor, pipeline, create_gloo_process_groups=False, distributed_timeout_minutes=timeout / 60
        )
    found = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if found != (tensor, pipeline):
        raise ConfigError(
            f"megatron-core's groups already exist, for tensor x pipeline {found}, not {(tensor, pipeline)}: call "
            "megatron.core.parallel_state.destroy_model_parallel() first"
        )
    return MegatronMPU(parallel_state)
