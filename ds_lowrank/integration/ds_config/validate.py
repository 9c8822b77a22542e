"""Validates a DeepSpeed configuration as a whole, before anything is built from it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.autotp_config import AutoTPConfig, AutoTPPresets, TPLayerSpec
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig

from ds_lowrank.collectives import global_rank
from ds_lowrank.environment.packages import is_importable, one_line
from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.ds_config.optimizer_block import optimizer_problems
from ds_lowrank.integration.ds_config.scheduler_block import scheduler_problems
from ds_lowrank.integration.ds_config.structure import Findings, compare
from ds_lowrank.integration.ds_config.values import autotp_size, is_enabled, precision, section, zero_block, zero_stage

log = logging.getLogger("ds_lowrank")

MOST_PROBLEMS = 20
LONGEST_PROBLEM = 2000
"""How many errors are listed, and how many characters each has at most."""

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""The package that each of DeepSpeed's monitors needs."""


def validate(config: Mapping[str, Any], name: str = "the DeepSpeed configuration") -> None:
    """Validate the configuration of a caller of ``ds_lowrank.initialize`` who names one of our methods.

    ``"auto"`` is accepted where DeepSpeed takes its default for it; a warning on rank 0 names those keys.

    Args:
        config: the configuration, without comments.
        name: what messages call it.

    Raises:
        ConfigError: it has unknown keys, wrong types or impossible values; the message names all of them.
    """
    found = compare(config)
    found.problems += [
        f"{key} is 'auto': only the Hugging Face Trainer fills it in, write the value" for key in found.auto
    ]
    _finish(config, found, name)
    if found.unset and global_rank() == 0:
        log.warning("%s leaves 'auto', which DeepSpeed reads as absent: %s", name, ", ".join(found.unset))


def validate_program(config: Mapping[str, Any], name: str, filled_in: Collection[str]) -> None:
    """Validate the configuration of a program that builds everything from it, with any optimizer.

    Args:
        config: the configuration, without comments.
        name: what messages call it: its file.
        filled_in: keys that the program itself fills in where they are ``"auto"``.

    Raises:
        ConfigError: as for ``validate``; also for an optimizer that does not exist or does not take its parameters,
            and for every other ``"auto"``, as there is no Hugging Face Trainer that would fill it in.
    """
    found = compare(config)
    found.problems += [
        f"{key} is 'auto': only the Hugging Face Trainer fills it in, write the value"
        for key in (*found.auto, *found.unset)
        if key not in filled_in
    ]
    if section(config, "tensor_parallel").get("autotp_size") == 0:
        found.problems.append(
            "tensor_parallel.autotp_size is 0: write the number of ranks that split a layer, or remove tensor_parallel"
        )
    found.problems += [
        f"pipeline.{key} has no effect: give --pipeline-parallel instead"
        for key in ("stages", "partition", "seed_layers")
        if key in section(config, "pipeline")
    ]
    if not found.problems:
        found.problems += _contradictions(config) or [*optimizer_problems(config, without_lr=True), *_device(config)]
    if not found.problems:
        found.problems += _refused_by_deepspeed(config)
    _finish(config, found, name)


def _refused_by_deepspeed(config: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed says when it reads the whole configuration; the batch sizes are settled later."""
    batch = {"train_batch_size": None, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    zero = {"zero_optimization": dict(zero_block(config))}  # DeepSpeed prints a page about the short form
    try:
        DeepSpeedConfig(copy.deepcopy({**config, **batch, **zero}))
    except Exception as error:  # assertions, TypeErrors and others, of which none may end in a traceback
        return [f"DeepSpeed does not take it: {one_line(error)}"]
    return []


def _device(config: Mapping[str, Any]) -> list[str]:
    """A setting that this device does not have."""
    kind, device = precision(config), get_accelerator()
    supported = {"fp16": device.is_fp16_supported, "bf16": device.is_bf16_supported}
    if section(config, "aio").get("use_gds") is True and device.device_name() != "cuda":
        return ["aio.use_gds: DeepSpeed has it on CUDA devices only: set it to false"]
    if kind == "fp32" or supported[kind]():
        return []
    return [f"{kind}.enabled: DeepSpeed has no {kind} on this {device.device_name()}: set it to false"]


def _finish(config: Mapping[str, Any], found: Findings, name: str) -> None:
    """Check what several keys say together, and raise one error for everything that was found."""
    if not found.problems:
        found.problems += [*_contradictions(config), *_missing_packages(config), *_partition_problems(config)]
        if "scheduler" in config:
            found.problems += scheduler_problems(config)
    if not found.problems:
        return
    shown = [_shortened(problem) for problem in found.problems[:MOST_PROBLEMS]]
    if len(found.problems) == 1:
        raise ConfigError(f"{name}: {shown[0]}")
    if len(found.problems) > MOST_PROBLEMS:
        shown.append(f"and {len(found.problems) - MOST_PROBLEMS} more")
    raise ConfigError(f"{name} has {len(found.problems)} errors:\n  " + "\n  ".join(shown))


def _shortened(problem: str) -> str:
    """A problem without the middle of a key or value that would fill the screen."""
    half = LONGEST_PROBLEM // 2
    return problem if len(problem) <= LONGEST_PROBLEM else f"{problem[:half]} ... {problem[-half:]}"


def _contradictions(config: Mapping[str, Any]) -> list[str]:
    """Settings that DeepSpeed refuses, or ignores, because of other settings."""
    found = []
    kind, stage = precision(config), zero_stage(config)
    if is_enabled(config, "fp16") and is_enabled(config, "bf16"):
        found.append("fp16.enabled and bf16.enabled are both true: set one of them to false")
    types = section(config, "data_types")
    parameters, accumulation = types.get("param_dtype"), types.get("grad_accum_dtype")
    dtype = DtypeEnum(kind)
    if parameters is not None and DtypeEnum(parameters) is not dtype:
        found.append(
            f"data_types.param_dtype is {parameters!r}, but the model trains in {kind}: remove it, or enable "
            "the other precision"
        )
    if accumulation is not None and DtypeEnum(accumulation) is not dtype:
        if DtypeEnum(accumulation) is not DtypeEnum.fp32:
            found.append(
                f"data_types.grad_accum_dtype is {accumulation!r}, but the model trains in {kind}: remove it, "
                "or set it to 'fp32'"
            )
        elif stage == 0:
            found.append(
                f"data_types.grad_accum_dtype {accumulation!r} with {kind} needs ZeRO: set "
                "zero_optimization.stage to 1, 2 or 3, or remove it"
            )
    scattered = stage == 2 and zero_block(config).get("reduce_scatter", True) is not False
    if scattered and config.get("gradient_allreduce_op", "mean") == "mean":
        for key, default in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
            if config.get(key, default) != default:
                found.append(f"{key} needs zero_optimization.reduce_scatter false at ZeRO 2: remove one of them")
    tensor_parallel = section(config, "tensor_parallel")
    for key in ("tp", "tensor_parallel"):
        size = section(tensor_parallel, key).get("tp_size", 1)
        if size not in (1, autotp_size(config)):
            found.append(f"tensor_parallel.{key}.tp_size {size} has no effect: set tensor_parallel.autotp_size")
    if stage == 3 and config.get("gradient_allreduce_op") == "sum":
        found.append("gradient_allreduce_op 'sum' is not supported at ZeRO 3: remove it")
    return found


def _missing_packages(config: Mapping[str, Any]) -> list[str]:
    return [
        f"{monitor}.enabled needs the package {package}: pip install {package}, or set it to false"
        for monitor, package in MONITORS.items()
        if is_enabled(config, monitor) and not is_importable(package)
    ]


def _partition_problems(config: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed's own parser says against AutoTP's rules, and keys that it would ignore."""
    block = section(config, "tensor_parallel")
    given = section(block, "partition_config")
    rules = given.get("layer_specs", [])
    found = _unknown("tensor_parallel.partition_config", given, AutoTPConfig)
    if isinstance(rules, list):
        for number, rule in enumerate(rules):
            if isinstance(rule, Mapping):
                found += _unknown(f"tensor_parallel.partition_config.layer_specs.{number}", rule, TPLayerSpec)
    if found or not {"partition_config", "preset_model"} & block.keys():
        return found
    preset = block.get("preset_model")
    if preset is not None and AutoTPPresets.get_preset(preset) is None:
        return [f"tensor_parallel.preset_model: DeepSpeed has no preset {preset!r}: remove it, or name one that it has"]
    try:
        TPTrainingConfig(**block).get_partition_config_object()
    except Exception as error:  # it fails in many ways on values of a wrong type
        return [f"tensor_parallel: DeepSpeed cannot read partition_config or preset_model: {one_line(error)}"]
    return []


def _unknown(at: str, given: Mapping[str, Any], known_by: Any) -> list[str]:
    known = {entry.name for entry in fields(known_by)}
    return [f"{at}.{key}: unknown key. Valid: {', '.join(sorted(known))}" for key in given if key not in known]
