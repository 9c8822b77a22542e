"""Refuses unsupported settings of a DeepSpeed configuration, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_lowrank.errors import MISSES_SHARDS, ConfigError
from ds_lowrank.integration.ds_config.values import (
    is_enabled,
    offload_device,
    precision,
    section,
    zero_block,
    zero_stage,
)


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


def _enabled(*path: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: is_enabled(config, *path)


def _offloads_parameters(config: Mapping[str, Any]) -> bool:
    return section(zero_block(config), "offload_param").get("device", "none") not in ("none", "auto")


def _offloads_nothing(config: Mapping[str, Any]) -> bool:
    return offload_device(config) == "cpu" and zero_block(config).get("stage", 0) in (0, "auto")


def _offloads_a_part(config: Mapping[str, Any]) -> bool:
    ratio = section(zero_block(config), "offload_optimizer").get("ratio", 1.0)
    return offload_device(config) == "cpu" and isinstance(ratio, int | float) and ratio < 1


def _has_super_offload(config: Mapping[str, Any]) -> bool:
    has = section(zero_block(config), "offload_optimizer").get("super_offload") is True
    return has and offload_device(config) == "cpu"


def _above_one(*path: str) -> Callable[[Mapping[str, Any]], bool]:
    def is_above_one(config: Mapping[str, Any]) -> bool:
        value = section(config, *path[:-1]).get(path[-1])
        return isinstance(value, int | float) and value > 1

    return is_above_one


def _true(*path: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: section(config, *path[:-1]).get(path[-1]) is True


def _false(*path: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: section(config, *path[:-1]).get(path[-1]) is False


MORE_RANKS = "remove it, or use ZeRO 2 or 3 on more ranks"
NOT_ZENFLOW = "remove it: it selects gradients for an Adam of its own"
WRITE_OFFLOAD = 'write "offload_optimizer": {"device": "cpu"} instead'
SOME_WOULD_STEP = "remove it: on a gradient that is not finite, some parameter groups would step and others would not"


def _granularity(config: Mapping[str, Any]) -> Any:
    zero = zero_block(config)
    return zero.get("stage3_module_granularity_threshold", zero.get("module_granularity_threshold", 0))


NO_MASTERS = (
    "set optimizer.params.master_weights to false, which rounds stochastically, or small updates vanish by rounding"
)
QUANTIZED = "remove it: it was never tested with a low-rank update"

UNSUPPORTED_SETTINGS = (
    UnsupportedSetting(
        "zero_optimization.offload_optimizer at stage 0",
        _offloads_nothing,
        "remove it, or set zero_optimization.stage to 1, 2 or 3: at stage 0 DeepSpeed has nothing to offload",
    ),
    UnsupportedSetting(
        "zero_optimization.offload_optimizer.device = nvme",
        lambda c: offload_device(c) == "nvme",
        "set it to cpu: DeepSpeed swaps states that are as large as the weights, and low-rank states are not",
    ),
    UnsupportedSetting(
        "zero_optimization.offload_optimizer.ratio below 1",
        _offloads_a_part,
        "remove it: what is not offloaded would be stepped by DeepSpeed's own Adam",
    ),
    UnsupportedSetting(
        "zero_optimization.offload_optimizer.super_offload",
        _has_super_offload,
        "remove it: a CPU Adam of DeepSpeed's would step everything",
    ),
    UnsupportedSetting("zero_optimization.offload_param", _offloads_parameters, MORE_RANKS),
    UnsupportedSetting("zero_optimization.cpu_offload", _true("zero_optimization", "cpu_offload"), WRITE_OFFLOAD),
    UnsupportedSetting(
        "zero_optimization.cpu_offload_param", _true("zero_optimization", "cpu_offload_param"), MORE_RANKS
    ),
    UnsupportedSetting("zero_optimization.zenflow", lambda c: bool(zero_block(c).get("zenflow")), NOT_ZENFLOW),
    UnsupportedSetting(
        "zero_optimization.zero_hpz_partition_size",
        _above_one("zero_optimization", "zero_hpz_partition_size"),
        "set it to 1",
    ),
    UnsupportedSetting(
        "zero_optimization.zero_quantized_weights", _true("zero_optimization", "zero_quantized_weights"), QUANTIZED
    ),
    UnsupportedSetting(
        "zero_optimization.zero_quantized_nontrainable_weights",
        _true("zero_optimization", "zero_quantized_nontrainable_weights"),
        QUANTIZED,
    ),
    UnsupportedSetting(
        "zero_optimization.zero_quantized_gradients",
        _true("zero_optimization", "zero_quantized_gradients"),
        QUANTIZED,
    ),
    UnsupportedSetting("weight_quantization", lambda c: bool(c.get("weight_quantization")), QUANTIZED),
    UnsupportedSetting(
        "zero_optimization.elastic_checkpoint",
        _true("zero_optimization", "elastic_checkpoint"),
        "set it to false: checkpoints open on any number of ranks without it",
    ),
    UnsupportedSetting(
        "zero_optimization.load_from_fp32_weights = false",
        _false("zero_optimization", "load_from_fp32_weights"),
        "remove it: a resumed run would continue from rounded weights",
    ),
    UnsupportedSetting(
        "zero_optimization.legacy_stage1",
        _true("zero_optimization", "legacy_stage1"),
        "remove it: DeepSpeed no longer has it",
    ),
    UnsupportedSetting(
        "zero_optimization.stage3_module_granularity_threshold",
        lambda c: _granularity(c) not in (0, "auto"),
        "remove it: DeepSpeed 0.19.8 fails with it when ZeRO 3 fetches a layer that returns an object",
    ),
    UnsupportedSetting(
        "checkpoint.load_universal",
        _true("checkpoint", "load_universal"),
        "remove it: checkpoints open on any layout, and universal ones are read by python -m ds_lowrank checkpoint",
    ),
    UnsupportedSetting(
        "bf16.check_grad_overflow = false",
        _false("bf16", "check_grad_overflow"),
        SOME_WOULD_STEP,
    ),
    UnsupportedSetting(
        "zero_optimization.compute_grad_norm = false",
        _false("zero_optimization", "compute_grad_norm"),
        SOME_WOULD_STEP,
    ),
    UnsupportedSetting(
        "bf16.bf16_master_weights_and_grads", _true("bf16", "bf16_master_weights_and_grads"), NO_MASTERS
    ),
    UnsupportedSetting("bf16.bf16_optimizer_states", _true("bf16", "bf16_optimizer_states"), NO_MASTERS),
    UnsupportedSetting(
        "fp16.fp16_master_weights_and_grads",
        _true("fp16", "fp16_master_weights_and_grads"),
        "remove it: without fp32 weights, small updates vanish by rounding. bf16 has optimizer.params.master_weights",
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
    UnsupportedSetting("fp16.auto_cast", _true("fp16", "auto_cast"), "remove it: cast the inputs in your own code"),
    UnsupportedSetting("sparse_gradients", lambda c: bool(c.get("sparse_gradients", False)), "set it to false"),
    UnsupportedSetting(
        "sequence_parallel_size",
        _above_one("sequence_parallel_size"),
        "DeepSpeed does not average over these ranks. Remove it and pass "
        "mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp, after its initialize_sequence_parallel, to "
        "ds_lowrank.initialize",
    ),
    UnsupportedSetting(
        "data_parallel_size",
        lambda c: "data_parallel_size" in c,
        "remove it: DeepSpeed takes it for sequence parallelism of another kind",
    ),
    UnsupportedSetting("expert_parallel", _enabled("expert_parallel"), "remove it: experts are not split over ranks"),
    UnsupportedSetting("managed_gradient_accumulation = false", _false("managed_gradient_accumulation"), "remove it"),
    UnsupportedSetting("compile.deepcompile", _true("compile", "deepcompile"), "remove it, and use engine.compile()"),
    UnsupportedSetting("hybrid_engine", _enabled("hybrid_engine"), "remove it: it is for alternating with inference"),
    UnsupportedSetting(
        "data_efficiency", _enabled("data_efficiency"), "remove it: it changes batches, layers and learning rates"
    ),
    UnsupportedSetting("autotuning", _enabled("autotuning"), "remove it: it ends the run after a few steps"),
)
"""Every refused setting, in the order of ``docs/configuration.md``."""


def check_supported(config: Mapping[str, Any], method: str, *, has_mpu: bool = False, has_masters: bool = True) -> None:
    """Refuse a configuration with unsupported settings.

    Args:
        config: the DeepSpeed configuration, validated or not.
        method: the method's name, for messages.
        has_mpu: whether a model-parallel unit is passed as well. Then DeepSpeed takes ``sequence_parallel_size`` from
            that, and a configuration may repeat it.
        has_masters: whether bf16 weights have fp32 copies. DeepSpeed's keys for having none are refused if so.

    Raises:
        ConfigError: it has such settings; the message says for each key what to change. Every rank reads the same
            configuration, so every rank raises.
    """
    if has_mpu:
        config = {key: value for key, value in config.items() if key != "sequence_parallel_size"}
    allowed = () if has_masters else ("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states")
    found = [setting for setting in UNSUPPORTED_SETTINGS if setting.is_set(config) and setting.key not in allowed]
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
    stage, kind = zero_stage(config), precision(config)
    if in_pipeline and stage > 1:
        raise ConfigError(
            f"ZeRO {stage} partitions gradients, which a pipeline accumulates over micro-batches: DeepSpeed allows "
            "zero_optimization.stage 0 and 1 with a pipeline; set one of them"
        )
    if stage == 0 and kind == "fp16":
        raise ConfigError(
            "fp16 at ZeRO 0: DeepSpeed 0.19.8 divides the gradient by a loss scale without having multiplied the loss "
            "by it. Set zero_optimization.stage to 1"
        )
    # In a pipeline DeepSpeed uses another wrapper for bf16, whose norm is right.
    if stage == 0 and tensor > 1 and kind == "bf16" and not in_pipeline:
        raise ConfigError(MISSES_SHARDS)
