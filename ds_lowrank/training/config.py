"""The DeepSpeed configuration of a run.

It is read once, overridden by the command line, and checked before anything is built.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from ds_lowrank.collectives import global_rank
from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.ds_config.optimizer_block import ADAM
from ds_lowrank.integration.ds_config.read import read_file
from ds_lowrank.integration.ds_config.validate import validate_program
from ds_lowrank.integration.ds_config.values import precision, section, zero_block, zero_stage
from ds_lowrank.integration.unsupported_settings import check_supported
from ds_lowrank.integration.without_masters import check_storage, keeps_masters

__all__ = ["BatchSizes", "precision", "read_config", "set_batch_sizes", "set_learning_rate", "zero_stage"]

log = logging.getLogger("ds_lowrank")

GLOBAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True)
class BatchSizes:
    """DeepSpeed's three batch sizes, with total = micro * accumulation * data-parallel ranks.

    Attributes:
        total: sequences per optimizer step on all ranks together.
        micro: sequences per forward pass on one rank.
        accumulation: forward passes per optimizer step on one rank.
    """

    total: int
    micro: int
    accumulation: int


def read_config(path: str | Path) -> dict[str, Any]:
    """Read and validate the DeepSpeed configuration of a run.

    What the command line may override, the learning rate and the batch sizes, is checked where it is settled.

    Args:
        path: a JSON file.

    Returns:
        The configuration without comments, with ``zero_optimization`` as an object, and with ``optimizer.params``.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is not a DeepSpeed configuration with an optimizer, or has keys, types or values that DeepSpeed,
            the optimizer or the programs do not take; the message names the file and each key.
    """
    config = read_file(path)
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        raise ConfigError(f'{path} names no optimizer: it needs "optimizer": {{"type": ..., "params": {{"lr": ...}}}}')
    validate_program(config, str(path), filled_in=(GLOBAL, MICRO, ACCUMULATION))
    try:
        has_masters = keeps_masters(section(config, "optimizer", "params"))
        check_supported(config, optimizer["type"], has_masters=has_masters)
        if not has_masters:
            check_storage(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    _check_checkpoints(config, path)
    optimizer.setdefault("params", {})
    if "zero_optimization" in config:
        config["zero_optimization"] = dict(zero_block(config))
    _use_torch_adam(optimizer, config)
    return config


def _check_checkpoints(config: dict[str, Any], path: str | Path) -> None:
    """Refuse DeepSpeed's other ways to write checkpoints: a run's checkpoint is one complete folder with a manifest."""
    block = config.get("checkpoint", {})
    keys = [f"checkpoint.{key}" for key in ("use_node_local_storage", "parallel_write", "writer") if block.get(key)]
    keys += ["datastates_ckpt"] if config.get("datastates_ckpt") not in (None, False) else []
    if keys:
        raise ConfigError(
            f"{path}: {keys[0]}: checkpoints are written by this program, in one shared folder: remove it"
        )


def _use_torch_adam(optimizer: dict[str, Any], config: dict[str, Any]) -> None:
    """On a CPU take torch's Adam: DeepSpeed would compile an extension for minutes, or wait for ever for its lock."""
    params = optimizer["params"]
    if optimizer["type"].lower() not in ADAM or params.get("torch_adam") or get_accelerator().device_name() != "cpu":
        return
    params["torch_adam"] = True
    params.pop("fp32_optimizer_states", None)
    if global_rank() == 0:
        log.info(
            "optimizer.type %s: torch's Adam is used, as if optimizer.params.torch_adam were true; on a CPU "
            "DeepSpeed's own would have to be compiled first",
            optimizer["type"],
        )


def set_learning_rate(
    config: dict[str, Any], lr: float | None, source: str | Path = "the DeepSpeed configuration"
) -> None:
    """Override ``optimizer.params.lr`` in place.

    Args:
        config: the DeepSpeed configuration.
        lr: the learning rate, or None to keep that of the configuration.
        source: the file of the configuration, for messages.

    Raises:
        ValueError: there is no learning rate.
    """
    params = config["optimizer"].setdefault("params", {})
    if lr is not None:
        params["lr"] = lr
    rate = params.get("lr")
    if rate is None:
        raise ValueError(f"no learning rate: set optimizer.params.lr in {source} or give --lr")
    if isinstance(rate, str):
        raise ValueError(f"{source}: optimizer.params.lr is {rate!r}, a string: write it without quotes, or give --lr")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
        raise ValueError(f"{source}: optimizer.params.lr must be a finite number of at least 0, not {json.dumps(rate)}")
    if rate > torch.finfo(torch.float32).max:
        raise ValueError(f"the learning rate {rate} is more than fp32 can hold: lower optimizer.params.lr or --lr")


def set_batch_sizes(config: dict[str, Any], ranks: int, total: int | None, micro: int | None) -> BatchSizes:
    """Set DeepSpeed's three batch-size keys in ``config`` so that total = micro * accumulation * ranks.

    A size from the command line replaces that of the configuration, whose accumulation steps are then derived again.

    Args:
        config: the DeepSpeed configuration; changed in place.
        ranks: the number of data-parallel ranks.
        total: the global batch size of the command line, if given.
        micro: the micro batch size of the command line, if given.

    Raises:
        ValueError: there is no batch size, or no whole numbers satisfy the equation.
    """
    given = {key: config[key] for key in (GLOBAL, MICRO, ACCUMULATION) if config.get(key, "auto") != "auto"}
    if total is not None or micro is not None:
        given.pop(ACCUMULATION, None)
    given |= {key: size for key, size in ((GLOBAL, total), (MICRO, micro)) if size is not None}
    for key, size in given.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{key} must be a positive whole number, not {size!r}")
    sizes = _solve(given, ranks)
    if sizes.total != sizes.micro * sizes.accumulation * ranks or sizes.accumulation < 1 or sizes.micro < 1:
        raise ValueError(
            f"the batch does not divide: {GLOBAL} {sizes.total} must be {MICRO} {given.get(MICRO, '(free)')} x "
            f"{ACCUMULATION} {given.get(ACCUMULATION, '(free)')} x {ranks} ranks; change --global-batch-size, "
            "--micro-batch-size or the number of ranks"
        )
    config |= {GLOBAL: sizes.total, MICRO: sizes.micro, ACCUMULATION: sizes.accumulation}
    return sizes


def _solve(given: dict[str, int], ranks: int) -> BatchSizes:
    total, micro, accumulation = given.get(GLOBAL), given.get(MICRO), given.get(ACCUMULATION)
    if total is None and micro is None:
        raise ValueError(
            f"no batch size: set {GLOBAL} or {MICRO} in the DeepSpeed configuration or give --global-batch-size"
        )
    if total is None:
        assert micro is not None
        accumulation = accumulation or 1
        return BatchSizes(micro * accumulation * ranks, micro, accumulation)
    if micro is None:
        accumulation = accumulation or 1
        return BatchSizes(total, total // (accumulation * ranks), accumulation)
    return BatchSizes(total, micro, accumulation or total // (micro * ranks))
