"""Gathering whole weights from the parts that ZeRO, tensor and pipeline parallelism store on different ranks."""

from __future__ import annotations

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
from ds_lowrank.placement.tensor_parallel import logical_matrices


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
    matrices = logical_matrices(parameter, tuple(local.shape), name, grid)
    logical = matrices[0]
    if grid.tensor is None or logical.placement == "replicated":
        return local
    sizes = [sum(s.block.numel for m in matrices for s in m.strips[rank]) for rank in range(grid.tensor_size)]
    padded = local.new_zeros(max(sizes))
    padded[: local.numel()] = local.reshape(-1)
    shards = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(shards, padded, group=grid.tensor)
    if logical.piece is not None:
        return _joined_rows([s[:n].view(-1, local.shape[1]) for s, n in zip(shards, sizes, strict=True)], parameter)
    whole: Tensor = local.new_empty(logical.shape)
    matrix = whole if whole.ndim == 2 else whole.view(1, -1)
    for shard, size, (strip,) in zip(shards, sizes, logical.strips, strict=True):
        part = matrix[slice(*strip.block.rows), slice(*strip.block.cols)]
        part.copy_(shard[:size].view(part.shape))
    return whole


def _joined_rows(shards: list[Tensor], parameter: Any) -> Tensor:
    """Join the shards of a fused weight. megatron-core splits each of the matrices in it separately."""
    parts = [shard.chunk(megatron_stride(parameter)) for shard in shards]
    return torch.cat([part for same in zip(*parts, strict=True) for part in same])


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
