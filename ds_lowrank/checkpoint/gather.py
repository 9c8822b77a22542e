"""Gathering whole weights from the parts that ZeRO, tensor and pipeline parallelism store on different ranks."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ds_lowrank.collectives import all_gather_object
from ds_lowrank.placement.grid import Grid, grid_of
from ds_lowrank.placement.marks import megatron_stride
from ds_lowrank.placement.parameter_names import logical_names
from ds_lowrank.placement.tensor_parallel import split_of


def whole_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Gather every parameter's whole weight on rank 0. Collective.

    Parameters are gathered one at a time, so that the whole model is never on one device.

    Returns:
        On rank 0, weights on the CPU, keyed by their names in the whole model. On the other ranks, an empty dict.
    """
    grid = grid_of(engine.mpu)
    # Rank 0, and the ranks of the other stages that send to it.
    keeps = dist.get_rank() == 0 or (grid.pipeline is not None and _ranks(grid.pipeline)[0] == 0)
    weights: dict[str, Tensor] = {}
    names = logical_names(engine.module)
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = _over_tensor_ranks(parameter, names.get(name, name), grid)
            if keeps:
                weights[names.get(name, name)] = whole.cpu().clone()
    if grid.pipeline is not None and keeps:
        weights = _over_stages(weights, grid.pipeline, engine.device)
    return weights if dist.get_rank() == 0 else {}


def _ranks(group: dist.ProcessGroup) -> list[int]:
    ranks: list[int] = dist.get_process_group_ranks(group)
    return ranks


def _over_tensor_ranks(parameter: Any, name: str, grid: Grid) -> Tensor:
    local: Tensor = parameter.detach()
    dim, sizes = split_of(parameter, tuple(local.shape), name, grid)
    if dim is None:
        return local
    shapes = [[size if axis == dim else n for axis, n in enumerate(local.shape)] for size in sizes]
    numels = [math.prod(shape) for shape in shapes]
    padded = local.new_zeros(max(numels))
    padded[: local.numel()] = local.reshape(-1)
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=grid.tensor)
    shards = [flat[:n].view(shape) for flat, n, shape in zip(gathered, numels, shapes, strict=True)]
    return _joined(shards, dim, megatron_stride(parameter))


def _joined(shards: list[Tensor], dim: int, stride: int) -> Tensor:
    """Join the shards of a weight, in which megatron-core splits each of ``stride`` stacked matrices separately."""
    parts = [shard.chunk(stride, dim) for shard in shards]
    return torch.cat([part for same in zip(*parts, strict=True) for part in same], dim)


def _over_stages(weights: dict[str, Tensor], group: dist.ProcessGroup, device: torch.device) -> dict[str, Tensor]:
    """The weights of all stages, sent to the first stage one tensor at a time.

    A tied weight arrives from two stages; both copies are equal.
    """
    stages = all_gather_object([(n, w.shape, w.dtype) for n, w in weights.items()], group)
    first, *others = _ranks(group)
    if dist.get_rank() != first:
        for weight in weights.values():
            dist.send(weight.to(device), first, group=group)
        return {}
    found = dict(weights)
    for sender, listed in zip(others, stages[1:], strict=True):
        for name, shape, dtype in listed:
            received = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(received, sender, group=group)
            found[name] = received.cpu()
    return found
