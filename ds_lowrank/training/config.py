"""The DeepSpeed configuration of a run.

It is read once, overridden by the command line, and checked before anything is built.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Read a DeepSpeed configuration from a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a DeepSpeed configuration with an optimizer; the message names the file.
    """
    path = Path(path)
    try:
        config = json.loads(path.read_text(), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise FileNotFoundError(f"no DeepSpeed configuration at {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a valid DeepSpeed configuration: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must contain one JSON object, not a {type(config).__name__}")
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        raise ValueError(f'{path} names no optimizer: it needs "optimizer": {{"type": ..., "params": {{"lr": ...}}}}')
    return config


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} appears twice in one object")
    return dict(pairs)


def set_learning_rate(config: dict[str, Any], lr: float | None) -> None:
    """Override ``optimizer.params.lr`` in place.

    Args:
        config: the DeepSpeed configuration.
        lr: the learning rate, or None to keep that of the configuration.

    Raises:
        ValueError: there is no learning rate.
    """
    params = config["optimizer"].setdefault("params", {})
    if lr is not None:
        params["lr"] = lr
    if not isinstance(params.get("lr"), int | float):
        raise ValueError("no learning rate: set optimizer.params.lr in the DeepSpeed configuration or give --lr")


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
        if not isinstance(size, int) or size < 1:
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


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration sets, 0 to 3."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def precision(config: dict[str, Any]) -> str:
    """The precision in which DeepSpeed will train the model: ``fp32``, ``bf16`` or ``fp16``."""
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled", False):
            return name
    return "fp32"
