"""Engines whose weights are stored in bf16 only: ``master_weights`` false in ``optimizer.params``.

DeepSpeed 0.19.8 has such weights at ZeRO 1 to 3, under two keys of ``bf16``. At ZeRO 0 it always wraps the optimizer of
a bf16 model and keeps fp32 copies. Of a model that it takes for fp32 it keeps none: so the model is converted here, and
DeepSpeed is given the configuration without ``bf16``. What it would do because of that section is done here, or written
into the configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ds_lowrank.collectives import global_rank
from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.ds_config.values import precision, section, zero_stage

logger = logging.getLogger("ds_lowrank")

BF16_STORAGE = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
"""DeepSpeed's keys for weights without fp32 copies. Without offload it takes the first only along with the second,
which means nothing to an optimizer of this package: ``state_dtype`` says how moments are stored."""


def keeps_masters(options: Mapping[str, Any]) -> bool:
    """Whether the weights have fp32 copies, as ``master_weights`` says.

    Args:
        options: of the optimizer.
    """
    return options.get("master_weights", True) is not False


def check_storage(settings: Mapping[str, Any]) -> None:
    """Refuse ``master_weights`` false where DeepSpeed would keep fp32 copies, or none can be told from the weights.

    Args:
        settings: the DeepSpeed configuration, validated.

    Raises:
        ConfigError: it is such a configuration; the message says what to change.
    """
    kind, stage, bf16 = precision(settings), zero_stage(settings), section(settings, "bf16")
    if kind != "bf16":
        raise ConfigError(
            f"optimizer.params.master_weights is false, and the model trains in {kind}: it is for weights in bf16. Set "
            "bf16.enabled to true, or remove it"
        )
    for key in BF16_STORAGE:
        if bf16.get(key) is False and stage:
            raise ConfigError(f"bf16.{key} is false, and so is optimizer.params.master_weights: remove one of them")
        if bf16.get(key) is True and not stage:
            raise ConfigError(
                f"bf16.{key} is for ZeRO 1 to 3: remove it, optimizer.params.master_weights false is enough at ZeRO 0"
            )
    accumulation = section(settings, "data_types").get("grad_accum_dtype")
    if stage == 1 and accumulation in ("fp32", "float32", "float", "torch.float32"):
        raise ConfigError(
            f"data_types.grad_accum_dtype {accumulation!r} with bf16 at ZeRO 1: DeepSpeed keeps fp32 copies of the "
            "weights, although optimizer.params.master_weights is false. Set zero_optimization.stage to 2, or remove "
            "one of them"
        )


def without_masters(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration with which DeepSpeed keeps no fp32 copies of the weights.

    Args:
        settings: the DeepSpeed configuration, checked by :func:`check_storage`.
    """
    if zero_stage(settings):
        return {**settings, "bf16": {**section(settings, "bf16"), **dict.fromkeys(BF16_STORAGE, True)}}
    changed = {key: value for key, value in settings.items() if key != "bf16"}
    if changed.get("communication_data_type") is None:
        changed["communication_data_type"] = "bf16"
    if "data_types" in changed:
        dtypes = ("param_dtype", "grad_accum_dtype")  # bf16, if anything
        changed["data_types"] = {key: value for key, value in changed["data_types"].items() if key not in dtypes}
    return changed


def convert_model(model: torch.nn.Module, settings: Mapping[str, Any]) -> None:
    """Convert a model at ZeRO 0 to bf16 as DeepSpeed would: its parameters, and buffers as ``data_types`` says.

    Args:
        model: changed in place.
        settings: the DeepSpeed configuration.
    """
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.config import DtypeEnum
    from deepspeed.runtime.keep_in_fp32 import keep_in_fp32_pattern

    types = section(settings, "data_types")
    buffers = None if types.get("buffer_dtype") is None else DtypeEnum(types["buffer_dtype"]).value
    kept = keep_in_fp32_pattern(model, types.get("keep_in_fp32_modules", "auto"), torch.bfloat16)
    DeepSpeedEngine._cast_module_mixed_precision(SimpleNamespace(module=model), torch.bfloat16, buffers, False, kept)
    if global_rank() == 0:
        logger.info(
            "weights are in bf16 without fp32 copies: to DeepSpeed, which would keep copies, this is an fp32 run"
        )
