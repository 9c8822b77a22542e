"""What DeepSpeed and megatron-core mark on a parameter, as predicates.

The marks are read in this folder only: ZeRO's partitions in :mod:`ds_lowrank.placement.zero`, tensor-parallel splits in
:mod:`ds_lowrank.placement.tensor_parallel`, the other marks here.
"""

from __future__ import annotations

from typing import Any

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
