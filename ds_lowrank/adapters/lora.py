"""LoRA with peft, as a baseline: adding it to a model, and merging it into a plain model for the export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TASK_TYPES = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
PREFIX = "base_model.model."
ADAPTER = "default"  # peft's name for a model's first adapter


def add_lora(model: torch.nn.Module, task: str, rank: int, alpha: float, targets: Sequence[str] | None) -> Any:
    """Add LoRA to a model. All other weights are frozen, except the head of a classifier.

    Args:
        model: the model.
        task: ``classification`` or ``causal-lm``.
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        targets: module names, in peft's notation; None for every linear layer except the head.

    Returns:
        The model wrapped in a ``peft.PeftModel``.

    Raises:
        ValueError: peft is not installed, or it finds no such module.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"--lora-rank needs peft ({error}): pip install '.[finetune]'") from error
    config = LoraConfig(
        task_type=TASK_TYPES[task],
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if targets is None else list(targets),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"--lora-rank {rank}, --lora-targets {targets}: {error}") from error


def has_lora(model: torch.nn.Module) -> bool:
    """Whether ``add_lora`` wrapped this model. Does not import peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def merge(model: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Merge gathered weights of a wrapped model: W + (alpha / r) B A.

    peft's own ``merge_and_unload`` needs whole weights in the modules, which are partitioned at ZeRO 3.

    Args:
        model: the model from ``add_lora``.
        weights: all of its parameters, whole, keyed by name.

    Returns:
        The plain model inside, and the merged weights under its parameter names.
    """
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        if name.endswith(".base_layer.weight"):
            module = name.removesuffix(".base_layer.weight")
            layer = model.get_submodule(module)
            up, down = (weights[f"{module}.lora_{side}.{ADAPTER}.weight"].float() for side in "BA")
            delta = layer.scaling[ADAPTER] * (up @ down)
            weight = (weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
        name = name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        merged[name] = weight
    return model.get_base_model(), merged
