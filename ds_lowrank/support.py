"""What is supported, checked on the DeepSpeed configuration before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_lowrank.errors import ConfigError
from ds_lowrank.models.adapter import has_adapters
from ds_lowrank.sharding.grid import grid_of
from ds_lowrank.sharding.zero import MISSES_SHARDS


@dataclass(frozen=True)
class Refusal:
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


SIZES_OF_SHARDS = ("output_size_per_partition", "input_size_per_partition", "num_embeddings_per_partition")
"""What megatron-core's parallel layers know."""
MORE_RANKS = "remove it, or use ZeRO 2 or 3 on more ranks"
SOME_WOULD_STOP = "remove it: a gradient that is not finite would stop some parameter groups and not the others"

REFUSALS = (
    Refusal("zero_optimization.offload_optimizer", _offloads("offload_optimizer"), MORE_RANKS),
    Refusal("zero_optimization.offload_param", _offloads("offload_param"), MORE_RANKS),
    Refusal("zero_optimization.cpu_offload", lambda c: bool(_zero(c).get("cpu_offload", False)), MORE_RANKS),
    Refusal("zero_optimization.zenflow", lambda c: bool(_zero(c).get("zenflow")), "remove it"),
    Refusal(
        "zero_optimization.zero_hpz_partition_size",
        _above_one("zero_optimization", "zero_hpz_partition_size"),
        "set it to 1",
    ),
    Refusal(
        "zero_optimization.elastic_checkpoint",
        lambda c: bool(_zero(c).get("elastic_checkpoint", False)),
        "set it to false: low-rank state cannot be cut like elementwise state",
    ),
    Refusal(
        "checkpoint.load_universal",
        lambda c: bool(c.get("checkpoint", {}).get("load_universal", False)),
        "remove it and resume on the layout that saved the checkpoint",
    ),
    Refusal(
        "bf16.check_grad_overflow = false",
        lambda c: c.get("bf16", {}).get("check_grad_overflow", True) is False,
        SOME_WOULD_STOP,
    ),
    Refusal(
        "zero_optimization.compute_grad_norm = false",
        lambda c: _zero(c).get("compute_grad_norm", True) is False,
        SOME_WOULD_STOP,
    ),
    Refusal("bfloat16", lambda c: "bfloat16" in c, "call it bf16"),
    Refusal("amp", _enabled("amp"), "use bf16 or fp16"),
    Refusal("torch_autocast", _enabled("torch_autocast"), "use bf16 or fp16"),
    Refusal("sparse_gradients", lambda c: bool(c.get("sparse_gradients", False)), "set it to false"),
)


def check_supported(config: Mapping[str, Any], method: str) -> None:
    """Refuse what cannot be honoured.

    Raises:
        ConfigError: names the key and what to change. Every rank reads the same file, so every rank raises.
    """
    asked = [refusal for refusal in REFUSALS if refusal.asked(config)]
    if asked:
        lines = [f"  {refusal.key} is not supported with {method}: {refusal.advice}" for refusal in asked]
        raise ConfigError("the DeepSpeed configuration cannot be honoured:\n" + "\n".join(lines))


def check_model(model: Any, mpu: Any, config: Mapping[str, Any], method: str) -> None:
    """Refuse models and grids on which the update, or the norm that it is clipped by, would not be the method's.

    Raises:
        ConfigError: says which, and what works.
    """
    from deepspeed.runtime.pipe import PipelineModule

    in_pipeline = isinstance(model, PipelineModule)
    if in_pipeline and mpu is not None:
        raise ConfigError("a PipelineModule brings its own grid: leave mpu out, and give the module its topology")
    unit, autotp = unit_of(model, mpu), autotp_size(config)
    if unit is not None and autotp > 1:
        raise ConfigError(
            "tensor_parallel.autotp_size makes a grid of its own: remove it, or give a plain model without mpu"
        )
    if getattr(unit, "get_context_parallel_world_size", lambda: 1)() > 1:
        raise ConfigError(
            "context parallelism is not supported: DeepSpeed would average gradients without its ranks. Set "
            "context_parallel_size to 1"
        )
    tensor = autotp if unit is None else grid_of(unit).tensor_size
    if unit is None and autotp == 1 and grid_of(None).tensor_size > 1:
        raise ConfigError(
            "tensor-parallel groups are initialised (megatron-core's, or of an earlier engine with AutoTP), and "
            "DeepSpeed was not told: it would average the gradients of different shards. Pass "
            "mpu=megatron.core.parallel_state to ds_lowrank.initialize"
        )
    check_stage(config, tensor, in_pipeline)
    _check_parameters(model, tensor, in_pipeline, method)


def unit_of(model: Any, mpu: Any) -> Any:
    """The model-parallel unit of an engine: a ``PipelineModule`` brings its own, else ``mpu``."""
    from deepspeed.runtime.pipe import PipelineModule

    return model.mpu() if isinstance(model, PipelineModule) else mpu


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


def _check_parameters(model: Any, tensor: int, in_pipeline: bool, method: str) -> None:
    experts = [name for name, p in model.named_parameters() if getattr(p, "allreduce", True) is False]
    if experts:
        raise ConfigError(
            f"{method}: expert parallelism is not supported yet ({experts[0]} is split over expert ranks): use a "
            "model without experts"
        )
    if (tensor > 1 or in_pipeline) and has_adapters(model):
        raise ConfigError(f"{method}: adapters are not split over ranks: use them with data parallelism only")
    if tensor > 1:
        _check_marks(model)


def _check_marks(model: Any) -> None:
    """megatron-core marks a weight as split while it draws it; told not to, it leaves a shard that looks whole."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        split = any(hasattr(module, size) for size in SIZES_OF_SHARDS)
        if split and weight is not None and not getattr(weight, "tensor_model_parallel", False):
            raise ConfigError(
                f"{name}.weight is a shard and not marked as one: set perform_initialization in megatron-core's config"
            )
