"""What the stages of a pipeline must agree on, and what passes between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.grid import Grid, grid_of

PARTITIONED = ("pipe_partitioned", "grad_partitioned")


def with_whole_activations(model: torch.nn.Module, settings: dict[str, Any], grid: Grid | None) -> dict[str, Any]:
    """The settings, for a pipeline whose tensor-parallel ranks hold different parts of the sequence changed.

    DeepSpeed by default lets each tensor-parallel rank send its share of an activation that all of them hold alike, and
    puts the shares together behind. With sequence parallelism they hold different ones, which would be mixed up.
    Collective over the pipeline: a stage without such layers must send as the others receive.

    Raises:
        ConfigError: the settings insist on it.
    """
    if grid is None or grid.pipeline is None:
        return settings
    here = any(getattr(module, "sequence_parallel", False) for module in model.modules())
    if not any(_of_all_stages(here, grid.pipeline)):
        return settings
    pipeline = dict(settings.get("pipeline", {}))
    insisted = [key for key in PARTITIONED if pipeline.get(key)]
    if insisted:
        raise ConfigError(
            f"pipeline.{insisted[0]} shares out activations that tensor-parallel ranks hold alike, and with sequence "
            "parallelism they hold different ones: remove it"
        )
    return {**settings, "pipeline": {**pipeline, **dict.fromkeys(PARTITIONED, False)}}


def check_groups(engine: DeepSpeedEngine) -> None:
    """Refuse parameter groups that not all stages have: DeepSpeed sums the norm over the stages group by group.

    Collective over the pipeline.

    Raises:
        ConfigError: says how many each stage has.
    """
    pipeline = grid_of(engine.mpu).pipeline
    if pipeline is None or not isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        return
    counts = _of_all_stages(len(engine.optimizer.bit16_groups), pipeline)
    if len(set(counts)) > 1:
        raise ConfigError(
            f"the stages of the pipeline have {counts} parameter groups with something in them, and DeepSpeed 0.19.8 "
            "would wait for the others at ZeRO 1: make groups of which every stage has a part, or set "
            "zero_optimization.stage to 0"
        )


def _of_all_stages(value: Any, pipeline: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(pipeline)
    dist.all_gather_object(values, value, group=pipeline)
    return values
