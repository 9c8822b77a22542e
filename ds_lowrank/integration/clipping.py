"""The norm of the raw gradient over a grid, and clipping by it where DeepSpeed 0.19.8 takes a wrong one.

In fp32 at ZeRO 0 it counts a parameter that tensor-parallel ranks hold copies of only where the *model*-parallel rank
is 0. In a pipeline that rank spans the stages, so all such parameters of the later stages are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ds_lowrank.placement.grid import Grid, grid_of
from ds_lowrank.placement.marks import is_megatron_shard, is_tied_between_stages


def gradient_norm(parameters: Sequence[torch.nn.Parameter], grid: Grid) -> torch.Tensor:
    """The 2-norm of the whole model's gradient, from reduced gradients in ``.grad``: a scalar, the same everywhere.

    A parameter that several ranks hold copies of counts once. Collective over the grid.
    """
    counted = [p.grad for p in parameters if p.grad is not None and _counts_here(p, grid)]
    device = next((p.device for p in parameters), None)
    norms = torch._foreach_norm(counted) if counted else []
    square = torch.stack([n.double().square() for n in norms]).sum() if norms else torch.zeros((), dtype=torch.float64)
    square = square.to(device) if device is not None else square
    for group in (grid.tensor, grid.pipeline):
        if group is not None:
            dist.all_reduce(square, group=group)
    return square.sqrt().float()


def _counts_here(parameter: Any, grid: Grid) -> bool:
    if is_tied_between_stages(parameter):
        return False
    return grid.tensor_rank == 0 or is_megatron_shard(parameter)


def keeps_no_norm(engine: DeepSpeedEngine) -> bool:
    """In fp32 at ZeRO 0 DeepSpeed has no wrapper that would keep it; the reduced gradients are then in ``.grad``."""
    lowered = engine.bfloat16_enabled() or engine.fp16_enabled()
    return engine.zero_optimization_stage() == 0 and not lowered


def is_repaired(engine: DeepSpeedEngine) -> bool:
    """Whether :func:`repair_clipping` lets it find, and keep, the norm after all."""
    return keeps_no_norm(engine) and not grid_of(engine.mpu).is_flat


def repair_clipping(engine: DeepSpeedEngine) -> None:
    """Let an fp32 engine without ZeRO on a grid find the whole norm, report it, and clip by it if it clips.

    Every other engine is left as it is.
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
    engine.gradient_clipping = lambda: limit or math.inf  # DeepSpeed asks for the norm only where this is above 0
