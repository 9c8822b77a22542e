"""What passes between the stages of a pipeline."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import PipelineModule

from ds_lowrank.errors import ConfigError

PARTITIONED = ("pipe_partitioned", "grad_partitioned")


def with_whole_activations(model: torch.nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, for a pipeline whose tensor-parallel ranks hold different parts of the sequence changed.

    DeepSpeed by default lets each tensor-parallel rank send its share of an activation that all of them hold alike, and
    puts the shares together behind. With sequence parallelism they hold different ones, which would be mixed up.

    Raises:
        ConfigError: the settings insist on it.
    """
    if not isinstance(model, PipelineModule) or not any(
        getattr(module, "sequence_parallel", False) for module in model.modules()
    ):
        return settings
    pipeline = dict(settings.get("pipeline", {}))
    insisted = [key for key in PARTITIONED if pipeline.get(key)]
    if insisted:
        raise ConfigError(
            f"pipeline.{insisted[0]} shares out activations that tensor-parallel ranks hold alike, and with sequence "
            "parallelism they hold different ones: remove it"
        )
    return {**settings, "pipeline": {**pipeline, **dict.fromkeys(PARTITIONED, False)}}
