"""Refuses unsupported settings of a DeepSpeed configuration, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_lowrank.errors import MISSES_SHARDS, ConfigError


@dataclass(frozen=True)
class UnsupportedSetting:
    """A setting with which the update would not be the method's, or that was never tested.

    Attributes:
        key: the setting's name in the configuration, sections separated by dots.
        is_set: whether a configuration has the setting.
        advice: what to change.
    """

    key: str
    is_set: Callable[[Mapping[str, Any]], bool]
    advice: str


def _enabled(section: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: bool(config.get(section, {}).get("enabled", False))


def _zero(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section: Mapping[str, Any] = config.get("zero_optimization", {})
    return section


def _offloads(part: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: (_zero(config).get(part) or {}).get("device", "none") != "none"


def _above_one(*path: str) -> Callable[[Mapping[str, Any]], bool]:
    def is_above_one(config: Mapping[str, Any]) -> bool:
        value: Any = config
        for key in path:
            value = (value or {}).get(key)
        return isinstance(value, int | float) and value > 1

    return is_above_one


MORE_RANKS = "remove it, or use ZeRO 2 or 3 on more ranks"
SOME_WOULD_STEP = "remove it: on a gradient that is not finite, some parameter groups would step and others would not"

UNSUPPORTED_SETTINGS = (
    UnsupportedSetting("zero_optimization.offload_optimizer", _offloads("offload_optimizer"), MORE_RANKS),
    UnsupportedSetting("zero_optimization.offload_param", _offloads("offload_param"), MORE_RANKS),
    UnsupportedSetting("zero_optimization.cpu_offload", lambda c: bool(_zero(c).get("cpu_offload", False)), MORE_RANKS),
    UnsupportedSetting("zero_optimization.zenflow", lambda c: bool(_zero(c).get("zenflow")), "remove it"),
    UnsupportedSetting(
        "zero_optimization.zero_hpz_partition_size",
        _above_one("zero_optimization", "zero_hpz_partition_size"),
        "set it to 1",
    ),
    UnsupportedSetting(
        "zero_optimization.elastic_checkpoint",
        lambda c: bool(_zero(c).get("elastic_checkpoint", False)),
        "set it to false: low-rank state cannot be split like elementwise state",
    ),
    UnsupportedSetting(
        "checkpoint.load_universal",
        lambda c: bool(c.get("checkpoint", {}).get("load_universal", False)),
        "remove it and resume on the layout that saved the checkpoint",
    ),
    UnsupportedSetting(
        "bf16.check_grad_overflow = false",
        lambda c: c.get("bf16", {}).get("check_grad_overflow", True) is False,
        SOME_WOULD_STEP,
    ),
    UnsupportedSetting(
        "zero_optimization.compute_grad_norm = false",
        lambda c: _zero(c).get("compute_grad_norm", True) is False,
        SOME_WOULD_STEP,
    ),
    UnsupportedSetting("bfloat16", lambda c: "bfloat16" in c, "rename it to bf16"),
    UnsupportedSetting("amp", _enabled("amp"), "use bf16 or fp16"),
    UnsupportedSetting("torch_autocast", _enabled("torch_autocast"), "use bf16 or fp16"),
    UnsupportedSetting(
        "data_parallel_size",
        lambda c: "data_parallel_size" in c and _above_one("sequence_parallel_size")(c),
        "with sequence_parallel_size it makes a device mesh, and DeepSpeed 0.19.8 averages gradients over its data "
        "dimension only, so that copies of the weights drift apart. Remove both, and pass "
        "mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp after its initialize_sequence_parallel",
    ),
    UnsupportedSetting(
        "expert_parallel",
        _enabled("expert_parallel"),
        "remove it: matrices that are split over expert ranks are not read",
    ),
    UnsupportedSetting("sparse_gradients", lambda c: bool(c.get("sparse_gradients", False)), "set it to false"),
)
"""Every refused setting, in the order of ``docs/configuration.md``."""


def check_supported(config: Mapping[str, Any], method: str) -> None:
    """Refuse a configuration with unsupported settings.

    Args:
        config: the DeepSpeed configuration.
        method: the method's name, for messages.

    Raises:
        ConfigError: it has such settings; the message says for each key what to change. Every rank reads the same
            configuration, so every rank raises.
    """
    found = [setting for setting in UNSUPPORTED_SETTINGS if setting.is_set(config)]
    if found:
        lines = [f"  {setting.key} is not supported with {method}: {setting.advice}" for setting in found]
        raise ConfigError("the DeepSpeed configuration has unsupported settings:\n" + "\n".join(lines))


def check_stage(config: Mapping[str, Any], tensor: int, in_pipeline: bool) -> None:
    """Refuse a ZeRO stage at which DeepSpeed has no pipeline, or gets gradients or their norm wrong.

    Args:
        config: the DeepSpeed configuration.
        tensor: the degree of tensor parallelism.
        in_pipeline: whether the model is a ``PipelineModule``.

    Raises:
        ConfigError: it is such a stage; the message names one that works.
    """
    stage = int(_zero(config).get("stage", 0))
    if in_pipeline and stage > 1:
        raise ConfigError(
            f"ZeRO {stage} partitions gradients, which a pipeline accumulates over micro-batches: DeepSpeed allows "
            "zero_optimization.stage 0 and 1 with a pipeline; set one of them"
        )
    if stage == 0 and _enabled("fp16")(config):
        raise ConfigError(
            "fp16 at ZeRO 0: DeepSpeed 0.19.8 divides the gradient by a loss scale without having multiplied the loss "
            "by it. Set zero_optimization.stage to 1"
        )
    # In a pipeline DeepSpeed uses another wrapper for bf16, whose norm is right.
    if stage == 0 and tensor > 1 and _enabled("bf16")(config) and not in_pipeline:
        raise ConfigError(MISSES_SHARDS)


def autotp_size(config: Mapping[str, Any]) -> int:
    """The degree of DeepSpeed's own tensor parallelism (AutoTP); 1 without.

    Args:
        config: the DeepSpeed configuration.
    """
    return int((config.get("tensor_parallel") or {}).get("autotp_size", 1))
