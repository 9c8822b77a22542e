"""Projected reduction in a DeepSpeed engine: who is in the average, and what is refused.

At ZeRO 0 in fp32 DeepSpeed leaves the optimizer as it is, and asks it which gradients to reduce.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.ds_config.values import precision, zero_stage
from ds_lowrank.optimizer.optimizer import LowRankOptimizer
from ds_lowrank.optimizer.projected import DataParallel

NO_SYNC = (
    "no_sync with reduction 'projected': projections are accumulated without it, and nothing is reduced before a step. "
    "Call engine.backward for every micro-batch, with gradient_accumulation_steps"
)


def check_projected(config: Mapping[str, Any], options: Mapping[str, Any], method: str) -> None:
    """Refuse settings that do not go with projected reduction.

    Args:
        config: the DeepSpeed configuration.
        options: of the optimizer.
        method: the method's name, for messages.

    Raises:
        ConfigError: there are such settings; the message says for each what to change.
    """
    if options.get("reduction") != "projected":
        return
    lines = []
    if (stage := zero_stage(config)) > 0:
        lines.append(
            f"zero_optimization.stage {stage}: DeepSpeed reduces whole gradients there, to split them. Set it to 0: "
            "states are split over the ranks all the same"
        )
    kind = precision(config)
    if kind == "fp16":
        lines.append("fp16: DeepSpeed copies and unscales whole gradients. Use bf16 with master_weights false, or fp32")
    if kind == "bf16" and options.get("master_weights", True):
        lines.append(
            "bf16 with fp32 masters: DeepSpeed copies whole gradients to fp32. Set optimizer.params.master_weights to "
            "false, or train in fp32"
        )
    if (clipping := config.get("gradient_clipping")) not in (None, 0, 0.0, "auto"):
        lines.append(
            f"gradient_clipping {clipping}: nobody has the norm of the whole gradient. Set it to 0 (in a Trainer, "
            "max_grad_norm), and optimizer.params.projected_gradient_clipping to clip by the norm of what is projected "
            "and of the other gradients"
        )
    if lines:
        raise ConfigError(
            f"{method} with reduction 'projected' does not go with\n" + "\n".join(f"  {line}" for line in lines)
        )


def without_clipping(config: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the clipping off that DeepSpeed 0.19.8 does by default, at a norm of 1.

    It would clip the gradients that it finds, those of parameters that are not projected.

    Args:
        config: the DeepSpeed configuration, checked by :func:`check_projected`.
        options: of the optimizer.
    """
    return {**config, "gradient_clipping": 0.0} if options.get("reduction") == "projected" else config


def share_projections(engine: DeepSpeedEngine) -> None:
    """Tell the optimizer of an engine which ranks have gradients of their own.

    Args:
        engine: DeepSpeed's, whose optimizer is one of this package and not bound yet; its ``no_sync`` is replaced if
            it reduces projections.
    """
    optimizer: LowRankOptimizer = engine.basic_optimizer
    if not optimizer.reduces_projections:
        return
    group = engine.seq_data_parallel_group
    optimizer.set_data_parallel(DataParallel(group, engine.sequence_parallel_size / dist.get_world_size(group)))

    def no_sync() -> None:
        raise ConfigError(NO_SYNC)

    engine.no_sync = no_sync
