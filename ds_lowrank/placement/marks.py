"""What DeepSpeed and megatron-core mark on a parameter, as predicates: nothing outside this folder reads the marks.

ZeRO's partitions are read in :mod:`ds_lowrank.placement.zero`, tensor-parallel splits in
:mod:`ds_lowrank.placement.tensor_parallel`.
"""

from __future__ import annotations

from typing import Any


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO 3 (``zero.Init`` included) has partitioned the parameter, so that the tensor itself is empty."""
    return hasattr(parameter, "ds_id")


def is_tied_between_stages(parameter: Any) -> bool:
    """Whether this is the copy of a tied weight that another stage of the pipeline owns."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def is_expert(parameter: Any) -> bool:
    """Whether the parameter belongs to an expert and is split over expert-parallel ranks."""
    return getattr(parameter, "allreduce", True) is False


def is_megatron_shard(parameter: Any) -> bool:
    """Whether megatron-core marks the parameter as split over tensor-parallel ranks."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def megatron_stride(parameter: Any) -> int:
    """How many matrices megatron-core has stacked in the parameter, each of them split on its own; 1 for one."""
    return int(getattr(parameter, "partition_stride", 1))
