"""Refusing an engine in which the optimizer that somebody chose would be replaced by another, without a word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ds_lowrank.environment.huggingface import HOW_TO_NAME_ONE, accelerates_config, calling_trainer
from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.ds_config.values import offload_device
from ds_lowrank.optimizer.waiting import waiting_optimizer

ADAMW = ("adamw_torch", "adamw_torch_fused")
"""What ``TrainingArguments.optim`` is if nobody has chosen."""
FORCED = "zero_force_ds_cpu_optimizer"


def without_forced_adam(settings: dict[str, Any], method: str) -> dict[str, Any]:
    """The settings with which DeepSpeed keeps the optimizer under offload: by default it takes none but its CPU Adam.

    Args:
        settings: the DeepSpeed configuration, validated.
        method: the method's name, for messages.

    Raises:
        ConfigError: offload is on, and the settings ask for DeepSpeed's CPU Adam.
    """
    if offload_device(settings) == "none":
        return settings
    if settings.get(FORCED) is True:
        raise ConfigError(f"{FORCED} is true, which asks for DeepSpeed's CPU Adam in the place of {method}: remove it")
    return {**settings, FORCED: False}


def check_trainer(method: str) -> None:
    """Refuse a second optimizer that was chosen in the Trainer's arguments, which transformers ignores.

    Args:
        method: the optimizer that the DeepSpeed configuration names.

    Raises:
        ConfigError: there is one; says where.
    """
    trainer = calling_trainer()
    if trainer is None:
        return
    chosen = getattr(trainer.args.optim, "value", trainer.args.optim)
    where = None
    if getattr(trainer, "optimizer_cls_and_kwargs", None) is not None:
        where = "optimizer_cls_and_kwargs was passed to the Trainer"
    elif chosen not in ADAMW:
        where = f"TrainingArguments.optim is {chosen!r}"
    if where is not None:
        raise ConfigError(
            f"{where}, and the DeepSpeed configuration names {method}: the Trainer would ignore the first without a "
            "word; remove one of the two"
        )


def check_not_replaced(parameters: Iterable[torch.nn.Parameter], optimizer: Any, named: str | None) -> None:
    """Refuse that the Trainer or accelerate trains with another optimizer while one of this package waits.

    Args:
        parameters: the model's.
        optimizer: the client's, an optimizer or what builds one; None for none.
        named: the ``optimizer.type`` of the configuration, or None.

    Raises:
        ConfigError: the Trainer or accelerate has dropped the one that was built for the model.
    """
    if optimizer is None and named is None:
        return
    if calling_trainer() is None and accelerates_config() is None:
        return  # the program itself has changed its mind
    waiting = next((found for found in map(waiting_optimizer, parameters) if found is not None), None)
    if waiting is not None:
        other = named if optimizer is None else type(optimizer).__name__
        raise ConfigError(
            f"{waiting} was built for this model, and DeepSpeed is about to train it with {other}: the Trainer drops "
            "Trainer(optimizers=...), and accelerate puts DeepSpeed's CPU Adam in the place of an optimizer if "
            f"offload_optimizer is set. For the Trainer {HOW_TO_NAME_ONE.format(waiting)}; with accelerate set "
            "zero_force_ds_cpu_optimizer to false"
        )
