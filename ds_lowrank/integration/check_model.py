"""Checks of the model and the grid, before an engine is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ds_lowrank.adapters.model import has_adapters
from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.ds_config.values import autotp_size, precision, zero_stage
from ds_lowrank.integration.unsupported_settings import check_stage
from ds_lowrank.placement.averaging import check_leftovers, check_unit
from ds_lowrank.placement.grid import grid_of, initialized_tensor_group, sequence_size
from ds_lowrank.placement.marks import is_expert, is_megatron_shard, is_split

SIZES_OF_SHARDS = ("output_size_per_partition", "input_size_per_partition", "num_embeddings_per_partition")
"""Attributes by which megatron-core's parallel layers, and only they, tell the size of their shard."""


def check_model(model: Any, mpu: Any, config: Mapping[str, Any], method: str) -> None:
    """Refuse a model or grid on which the update, or the norm used for clipping, would be wrong.

    Args:
        model: a module or ``PipelineModule``, before DeepSpeed changes it.
        mpu: the caller's model-parallel unit, or None.
        config: the DeepSpeed configuration.
        method: the method's name, for messages.

    Raises:
        ConfigError: the model or the grid is not supported; the message says what is.
    """
    from deepspeed.runtime.pipe import PipelineModule

    in_pipeline = isinstance(model, PipelineModule)
    if in_pipeline and mpu is not None:
        raise ConfigError("a PipelineModule has its own grid: omit mpu, and pass the topology to the module")
    if in_pipeline and torch.get_default_dtype() != torch.float32:
        raise ConfigError(
            "DeepSpeed's PipelineEngine sends losses in fp32 and receives them in torch's default dtype, which is "
            f"{torch.get_default_dtype()}: call torch.set_default_dtype(torch.float32) before ds_lowrank.initialize"
        )
    unit, autotp = model_parallel_unit(model, mpu), autotp_size(config)
    if unit is not None and autotp > 1:
        raise ConfigError(
            "tensor_parallel.autotp_size creates its own grid: remove it, or pass a plain model without mpu"
        )
    if unit is not None:
        check_unit(unit)
    _check_sequence_size(config, unit)
    if unit is None and autotp == 1:
        _check_no_unit(model)
    tensor = autotp if unit is None else grid_of(unit).tensor_size
    check_stage(config, tensor, in_pipeline)
    _check_parameters(model, tensor, in_pipeline, method)
    is_arranged = zero_stage(config) > 0 or precision(config) != "fp32"
    if is_arranged and not in_pipeline and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"{method} has nothing to train, every parameter of the model is frozen: unfreeze some before the engine "
            "is built, as DeepSpeed takes up none later"
        )


def model_parallel_unit(model: Any, mpu: Any) -> Any:
    """The model-parallel unit of an engine: that of the model if it is a ``PipelineModule``, else ``mpu``.

    Args:
        model: the engine's.
        mpu: the caller's, or None.
    """
    from deepspeed.runtime.pipe import PipelineModule

    return model.mpu() if isinstance(model, PipelineModule) else mpu


def _check_no_unit(model: Any) -> None:
    """Refuse an engine without ``mpu`` for which DeepSpeed would average gradients over the wrong ranks."""
    check_leftovers()
    if initialized_tensor_group() is not None and _has_shards(model):
        raise ConfigError(
            "tensor-parallel groups are initialised (by megatron-core, or by an earlier engine with AutoTP), but "
            "DeepSpeed does not know of them and would average the gradients of different shards. Pass "
            "mpu=megatron.core.parallel_state to ds_lowrank.initialize"
        )


def _has_shards(model: Any) -> bool:
    """Whether any layer of the model is split, marked as such or not."""
    return any(is_split(parameter) for parameter in model.parameters()) or any(
        hasattr(module, size) for module in model.modules() for size in SIZES_OF_SHARDS
    )


def _check_sequence_size(config: Mapping[str, Any], unit: Any) -> None:
    """Refuse a size of sequence groups that the groups do not have: DeepSpeed counts batches by it."""
    size = config.get("sequence_parallel_size")
    if size is not None and size != sequence_size(unit):
        raise ConfigError(
            f"sequence_parallel_size is {size}, but the mpu has sequence groups of {sequence_size(unit)}: remove it or "
            f"call initialize_sequence_parallel({size}) of deepspeed.runtime.sequence_parallel.parallel_state_sp and "
            "pass that module as mpu"
        )


def _check_parameters(model: Any, tensor: int, in_pipeline: bool, method: str) -> None:
    experts = [name for name, p in model.named_parameters() if is_expert(p)]
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
    """Refuse shards without marks: megatron-core marks a weight as split only when it initialises the weight."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        split = any(hasattr(module, size) for size in SIZES_OF_SHARDS)
        if split and weight is not None and not is_megatron_shard(weight):
            raise ConfigError(
                f"{name}.weight is a shard but not marked as one: set perform_initialization in megatron-core's config"
            )
