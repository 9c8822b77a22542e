"""What a configuration sets, read as DeepSpeed reads it; everything that asks for the stage or precision asks here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def section(config: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """An object in the configuration; empty if it is absent or something else.

    Args:
        config: the DeepSpeed configuration.
        *path: the keys that lead to it.
    """
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def zero_block(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``zero_optimization`` as an object. DeepSpeed reads ``true`` as stage 1, ``false`` as stage 0.

    Args:
        config: the DeepSpeed configuration.
    """
    block = config.get("zero_optimization")
    if block is True:
        return {"stage": 1, "allgather_bucket_size": config.get("allgather_size", 500_000_000)}
    return section(config, "zero_optimization")


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage, 0 to 3. DeepSpeed reads ``"auto"`` as absent.

    Args:
        config: the DeepSpeed configuration, validated.
    """
    stage = zero_block(config).get("stage", 0)
    return 0 if stage == "auto" else int(stage)


def offload_device(config: Mapping[str, Any]) -> str:
    """Where optimizer states are kept: ``none`` (with the model), ``cpu`` or ``nvme``. ``"auto"`` is read as absent.

    Args:
        config: the DeepSpeed configuration.
    """
    device = section(zero_block(config), "offload_optimizer").get("device", "none")
    return device if device in ("cpu", "nvme") else "none"


def is_enabled(config: Mapping[str, Any], *path: str) -> bool:
    """Whether a section has ``enabled``. DeepSpeed reads ``"auto"`` as absent, which is off.

    Args:
        config: the DeepSpeed configuration, validated.
        *path: the keys that lead to the section.
    """
    return section(config, *path).get("enabled") is True


def precision(config: Mapping[str, Any]) -> str:
    """The precision in which DeepSpeed trains the model: ``fp32``, ``bf16`` or ``fp16``.

    Args:
        config: the DeepSpeed configuration, validated.
    """
    if is_enabled(config, "fp16"):
        return "fp16"
    return "bf16" if is_enabled(config, "bf16" if config.get("bf16") is not None else "bfloat16") else "fp32"


def autotp_size(config: Mapping[str, Any]) -> int:
    """The degree of DeepSpeed's own tensor parallelism (AutoTP); 1 without. DeepSpeed reads 0 as without.

    Args:
        config: the DeepSpeed configuration, validated.
    """
    size = section(config, "tensor_parallel").get("autotp_size", 0)
    return 1 if size == "auto" else max(1, int(size))
