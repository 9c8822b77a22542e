"""The gradient norm over a grid, and clipping by it for engines whose own norm is wrong.

In fp32 at ZeRO 0, DeepSpeed 0.19.8 counts a parameter that is replicated on tensor-parallel ranks only if the
*model*-parallel rank is 0. In a pipeline this rank spans the stages, so it omits all such parameters of the later
stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.grid import Grid, grid_of, sequence_size
from ds_lowrank.placement.marks import is_megatron_shard, is_tied_between_stages


def gradient_norm(parameters: Sequence[torch.nn.Parameter], grid: Grid) -> torch.Tensor:
    """The 2-norm of the whole model's gradient, before clipping. Collective over the grid.

    A parameter that several ranks have copies of counts once.

    Args:
        parameters: all parameters on this rank; their ``.grad`` is already averaged over the data-parallel ranks.
        grid: tensor and pipeline parallelism.

    Returns:
        A scalar, fp32, the same on all ranks.
    """
    counted = [p.grad for p in parameters if p.grad is not None and _counts_here(p, grid)]
    device = next((p.device for p in parameters), None)
    norms = torch._foreach_norm(counted, dtype=torch.float32) if counted else []
    zero = torch.zeros((), dtype=torch.float64, device=device or "cpu")
    square = torch.stack([n.double().square() for n in norms]).sum() if norms else zero
    for group in (grid.tensor, grid.pipeline):
        if group is not None:
            dist.all_reduce(square, group=group)
    return square.sqrt().float()


def _counts_here(parameter: Any, grid: Grid) -> bool:
    if is_tied_between_stages(parameter):
        return False
    return grid.tensor_rank == 0 or is_megatron_shard(parameter)


def check_norm(engine: DeepSpeedEngine) -> None:
    """Refuse a wrapper that fails in its first step on the norm of sequence-parallel ranks.

    Args:
        engine: DeepSpeed's.

    Raises:
        ConfigError: it is such a wrapper.
    """
    if isinstance(engine.optimizer, BF16_Optimizer) and sequence_size(engine.mpu) > 1:
        raise ConfigError(
            "data_types.grad_accum_dtype fp32 with bf16 at ZeRO 1 and an mpu with sequence groups: DeepSpeed 0.19.8 "
            "takes all ranks of a sequence group but the first for tensor-parallel ones and finds nothing to take "
            "the gradient norm of. Remove data_types, or set zero_optimization.stage to 2"
        )


def keeps_no_norm(engine: DeepSpeedEngine) -> bool:
    """Whether an engine does not record its gradient norm: in fp32 at ZeRO 0 no wrapper of DeepSpeed's does.

    The averaged gradients are then in ``.grad``.

    Args:
        engine: DeepSpeed's.
    """
    low_precision = engine.bfloat16_enabled() or engine.fp16_enabled()
    return engine.zero_optimization_stage() == 0 and not low_precision


def is_repaired(engine: DeepSpeedEngine) -> bool:
    """Whether :func:`repair_clipping` changes an engine, which then records its gradient norm.

    Args:
        engine: DeepSpeed's.
    """
    return keeps_no_norm(engine) and not grid_of(engine.mpu).is_flat


def repair_clipping(engine: DeepSpeedEngine) -> None:
    """Make an fp32 engine without ZeRO on a grid compute and record the norm of the whole gradient, and clip by it.

    It clips only if its configuration sets ``gradient_clipping``. Every other engine is left unchanged.

    Args:
        engine: DeepSpeed's; its ``clip_fp32_gradients`` and ``gradient_clipping`` are replaced.
    """
    if not is_repaired(engine):
        return
    grid, limit = grid_of(engine.mpu), engine.gradient_clipping()

    def clip_fp32_gradients(self: DeepSpeedEngine) -> None:
        parameters = list(self.module.parameters())
        norm = gradient_norm(parameters, grid)
        self._global_grad_norm = norm
        if limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)

    engine.clip_fp32_gradients = MethodType(clip_fp32_gradients, engine)
    engine.gradient_clipping = lambda: limit or math.inf  # DeepSpeed computes the norm only if this is above 0
