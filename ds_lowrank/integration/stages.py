"""What the stages of a pipeline must have in common: parameter groups, and the form in which activations are sent."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_lowrank.collectives import all_gather_object
from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.grid import Grid, grid_of

PARTITIONED = ("pipe_partitioned", "grad_partitioned")
"""DeepSpeed's settings with which tensor-parallel ranks each send a part of an activation, or of its gradient."""


def with_whole_activations(model: torch.nn.Module, settings: dict[str, Any], grid: Grid | None) -> dict[str, Any]:
    """A configuration with which activations of sequence-parallel layers are sent whole between stages.

    By default DeepSpeed assumes that all tensor-parallel ranks have the same activation: each sends a part of it to the
    next stage, which joins the parts. With sequence parallelism the ranks have different activations, which would be
    mixed up. Collective over the pipeline: a stage without such layers must send in the form that the others receive.

    Args:
        model: this rank's stage.
        settings: the DeepSpeed configuration.
        grid: tensor and pipeline parallelism; None without.

    Returns:
        The settings themselves without sequence parallelism or without a pipeline, else a changed copy.

    Raises:
        ConfigError: there is sequence parallelism, and the settings ask for activations in parts.
    """
    if grid is None or grid.pipeline is None:
        return settings
    on_this_stage = any(getattr(module, "sequence_parallel", False) for module in model.modules())
    if not any(all_gather_object(on_this_stage, grid.pipeline)):
        return settings
    pipeline = dict(settings.get("pipeline", {}))
    partitioned = [key for key in PARTITIONED if pipeline.get(key)]
    if partitioned:
        raise ConfigError(
            f"pipeline.{partitioned[0]} needs the same activations on all tensor-parallel ranks, but with sequence "
            "parallelism they have different ones: remove it"
        )
    return {**settings, "pipeline": {**pipeline, **dict.fromkeys(PARTITIONED, False)}}


def check_groups(engine: DeepSpeedEngine) -> None:
    """Refuse parameter groups that some stages lack. Collective over the pipeline.

    At ZeRO 1 DeepSpeed sums the gradient norm over the stages group by group, and would wait for a missing one.

    Args:
        engine: DeepSpeed's.

    Raises:
        ConfigError: the stages have different numbers of groups; the message has the numbers.
    """
    pipeline = grid_of(engine.mpu).pipeline
    if pipeline is None or not isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        return
    counts = all_gather_object(len(engine.optimizer.bit16_groups), pipeline)
    if len(set(counts)) > 1:
        raise ConfigError(
            f"the stages of the pipeline have {counts} parameter groups that are not empty, and at ZeRO 1 DeepSpeed "
            "0.19.8 would wait for the missing ones: build groups that have parameters on every stage, or set "
            "zero_optimization.stage to 0"
        )
