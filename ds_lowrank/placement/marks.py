"""What DeepSpeed, megatron-core and PyTorch mark on a parameter, as predicates.

The marks are read in this folder only: ZeRO's partitions in :mod:`ds_lowrank.placement.zero`, tensor-parallel splits in
:mod:`ds_lowrank.placement.tensor_parallel`, the other marks here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ds_lowrank.errors import ConfigError

AUTOTP = "ds_autotp_universal_checkpoint_meta"
"""The attribute of a parameter in which AutoTP describes its split."""


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO 3 (``zero.Init`` included) has partitioned the parameter, so that the tensor itself is empty."""
    return hasattr(parameter, "ds_id")


def is_tied_between_stages(parameter: Any) -> bool:
    """Whether the parameter is a copy of a tied weight that another pipeline stage owns."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def is_expert(parameter: Any) -> bool:
    """Whether the parameter belongs to an expert and is split over expert-parallel ranks."""
    return getattr(parameter, "allreduce", True) is False


def is_megatron_shard(parameter: Any) -> bool:
    """Whether megatron-core marks the parameter as split over tensor-parallel ranks."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def is_split(parameter: Any) -> bool:
    """Whether megatron-core or AutoTP marks the parameter as part of a tensor-parallel layer."""
    return is_megatron_shard(parameter) or getattr(parameter, AUTOTP, None) is not None


def megatron_stride(parameter: Any) -> int:
    """Number of matrices that megatron-core has stacked in the parameter, each split on its own; 1 for a plain one."""
    return int(getattr(parameter, "partition_stride", 1))


def refuse_uninitialized(parameter: torch.Tensor, name: str) -> None:
    """Refuse a parameter of a lazy module that has no shape yet.

    Args:
        parameter: as the caller gave it.
        name: the parameter's name in the model.

    Raises:
        ConfigError: it is such a parameter.
    """
    if torch.nn.parameter.is_lazy(parameter):
        raise ConfigError(
            f"{name} has no shape yet, as its module is lazy: run the model's forward once before the optimizer is "
            "built"
        )


def foreign_sharding(parameter: Any) -> str | None:
    """What a parameter is whose elements are stored in a way that is not read here; None if they are.

    Args:
        parameter: as the caller gave it.

    Returns:
        A noun with its article, for a message.
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(parameter, tensors.DTensor):
        return "a DTensor, as fully_shard (FSDP2) and PyTorch's tensor parallelism make them"
    if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        return "a part of a flat parameter of FullyShardedDataParallel (FSDP1), which has no matrices"
    if type(parameter).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {type(parameter).__name__}, a tensor subclass that stores its elements in its own way"
    return None


def refuse_foreign_sharding(parameter: torch.Tensor, name: str) -> None:
    """Refuse a parameter that is trained and whose elements are stored or split in a way that is not read here.

    Args:
        parameter: as the caller gave it.
        name: the parameter's name in the model.

    Raises:
        ConfigError: it is such a parameter.
    """
    found = foreign_sharding(parameter) if parameter.requires_grad else None
    if found is not None:
        raise ConfigError(
            f"{name} is {found}: give ds_lowrank plain parameters. DeepSpeed's ZeRO, which it reads, splits a model "
            "over ranks like FSDP"
        )
    if parameter.requires_grad and is_expert(parameter):
        raise ConfigError(
            f"{name} is split over expert ranks (its allreduce is False), and expert parallelism is not supported: use "
            "experts that are whole on every rank, such as those of transformers"
        )
