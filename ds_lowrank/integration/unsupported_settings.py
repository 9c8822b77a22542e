"""What is supported, checked on the DeepSpeed configuration before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_lowrank.errors import MISSES_SHARDS, ConfigError


@dataclass(frozen=True)
class UnsupportedSetting:
    """A combination that would not compute the method's update, or was never tested."""

    key: str
    asked: Callable[[Mapping[str, Any]], bool]
    advice: str


def _enabled(section: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: bool(config.get(section, {}).get("enabled", False))


def _zero(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section: Mapping[str, Any] = config.get("zero_optimization", {})
    return section


def _offloads(part: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: (_zero(config).get(part) or {}).get("device", "none") != "none"


def _above_one(*path: str) -> Callable[[Mapping[str, Any]], bool]:
    def asked(config: Mapping[str, Any]) -> bool:
        value: Any = config
        for key in path:
            value = (value or {}).get(key)
        return isinstance(value, int | float) and value > 1

    return asked


MORE_RANKS = "remove it, or use ZeRO 2 or 3 on more ranks"
SOME_WOULD_STOP = "remove it: a gradient that is not finite would stop some parameter groups and not the others"

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
        "set it to false: low-rank state cannot be cut like elementwise state",
    ),
    UnsupportedSetting(
        "checkpoint.load_universal",
        lambda c: bool(c.get("checkpoint", {}).get("load_universal", False)),
        "remove it and resume on the layout that saved the checkpoint",
    ),
    UnsupportedSetting(
        "bf16.check_grad_overflow = false",
        lambda c: c.get("bf16", {}).get("check_grad_overflow", True) is False,
        SOME_WOULD_STOP,
    ),
    UnsupportedSetting(
        "zero_optimization.compute_grad_norm = false",
        lambda c: _zero(c).get("compute_grad_norm", True) is False,
        SOME_WOULD_STOP,
    ),
    UnsupportedSetting("bfloat16", lambda c: "bfloat16" in c, "call it bf16"),
    UnsupportedSetting("amp", _enabled("amp"), "use bf16 or fp16"),
    UnsupportedSetting("torch_autocast", _enabled("torch_autocast"), "use bf16 or fp16"),
    UnsupportedSetting("sparse_gradients", lambda c: bool(c.get("sparse_gradients", False)), "set it to false"),
)


def check_supported(config: Mapping[str, Any], method: str) -> None:
    """Refuse what cannot be honoured.

    Raises:
        ConfigError: names the key and what to change. Every rank reads the same file, so every rank raises.
    """
    asked = [refusal for refusal in UNSUPPORTED_SETTINGS if refusal.asked(config)]
    if asked:
        lines = [f"  {refusal.key} is not supported with {method}: {refusal.advice}" for refusal in asked]
        raise ConfigError("the DeepSpeed configuration cannot be honoured:\n" + "\n".join(lines))


def check_stage(config: Mapping[str, Any], tensor: int, in_pipeline: bool) -> None:
    """Refuse a ZeRO stage at which DeepSpeed has no pipeline, or gets gradients or their norm wrong.

    Raises:
        ConfigError: with the stage that works.
    """
    stage = int(_zero(config).get("stage", 0))
    if in_pipeline and stage > 1:
        raise ConfigError(
            f"ZeRO {stage} partitions gradients, which a pipeline accumulates over micro-batches: DeepSpeed allows "
            "zero_optimization.stage 0 and 1 with a pipeline; set one of them"
        )
    if stage == 0 and _enabled("fp16")(config):
        raise ConfigError(
            "fp16 at ZeRO 0: DeepSpeed 0.19.8 divides the gradient by a loss scale that it has not multiplied the loss "
            "by. Set zero_optimization.stage to 1"
        )
    # In a pipeline bf16 has another wrapper, whose norm is right.
    if stage == 0 and tensor > 1 and _enabled("bf16")(config) and not in_pipeline:
        raise ConfigError(MISSES_SHARDS)


def autotp_size(config: Mapping[str, Any]) -> int:
    """DeepSpeed's own tensor-parallel degree."""
    return int((config.get("tensor_parallel") or {}).get("autotp_size", 1))
