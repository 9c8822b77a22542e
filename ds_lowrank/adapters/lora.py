"""LoRA by peft, as a baseline: low-rank weights beside frozen ones, and one plain model when they are exported."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TASK_TYPES = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
PREFIX = "base_model.model."
ADAPTER = "default"  # peft's name for the only one


def add_lora(model: torch.nn.Module, task: str, rank: int, alpha: float, targets: Sequence[str] | None) -> Any:
    """Wrap the model: its weights are frozen but for the head of a classifier, which is trained whole.

    targets: names of modules, as peft takes them; None for every linear layer but the head.

    Raises ValueError where peft finds no such module, or is not installed.
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
    """Whether `add_lora` made it. Does not import peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def merge(model: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The plain model inside, and its weights W + (alpha / r) B A, from whole weights by the names of the wrapped one.

    peft's own `merge_and_unload` needs whole weights in the modules, which ZeRO 3 does not have.
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
