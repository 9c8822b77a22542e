"""Checks the ``optimizer`` block: does the named optimizer exist here, and does it take these parameters?"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_lowrank.environment.packages import is_importable
from ds_lowrank.errors import ConfigError, closest_name
from ds_lowrank.integration.ds_config.values import zero_stage
from ds_lowrank.optimizer.options import method_named, parse_options
from ds_lowrank.optimizer.registry import OPTIMIZERS

ADAM = ("adam", "adamw", "muon")
"""DeepSpeed's optimizers that use its own Adam, unless ``torch_adam`` is true."""

KERNELS = ("lamb", "lion")
"""DeepSpeed's optimizers that exist only as its CUDA extensions."""

Rate = Annotated[float, Field(ge=0)]


class Common(BaseModel):
    """Parameters that mean the same in all optimizers."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    lr: Rate | None = None
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = None
    eps: Rate | None = None
    weight_decay: Rate | None = None
    momentum: Rate | None = None
    amsgrad: bool | None = None
    nesterov: bool | None = None
    torch_adam: bool | None = None
    adam_w_mode: bool | None = None


def optimizer_names() -> list[str]:
    """Every ``optimizer.type``: this package's methods, DeepSpeed's optimizers and torch's."""
    classes = [name for name, value in vars(torch.optim).items() if _is_optimizer(value)]
    return sorted({*OPTIMIZERS, *classes, "Lamb", "Lion", "Muon"})


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer


def optimizer_problems(config: Mapping[str, Any], *, without_lr: bool) -> Iterable[str]:
    """What is wrong with the optimizer of a configuration whose keys and types are right.

    Args:
        config: the DeepSpeed configuration, with an ``optimizer`` block.
        without_lr: whether the learning rate is checked elsewhere, because the command line may replace it.
    """
    block = config["optimizer"]
    name, params = block["type"], dict(block.get("params", {}))
    if without_lr:
        params.pop("lr", None)
    if name in OPTIMIZERS:
        try:
            parse_options(method_named(name), params)
        except ConfigError as error:
            return str(error).splitlines()
        return []
    if name.lower() not in DEEPSPEED_OPTIMIZERS and not _is_optimizer(getattr(torch.optim, name, None)):
        closest = closest_name(name, optimizer_names(), cutoff=0.5)
        question = f"; did you mean {closest!r}?" if closest else f". Valid: {', '.join(optimizer_names())}"
        return [f"optimizer.type: {name!r} is no optimizer of ds_lowrank, DeepSpeed or torch{question}"]
    return [*_values(name, params), *_names(name, params), *_place(config, name)] or _trial(name, params)


def _values(name: str, params: Mapping[str, Any]) -> list[str]:
    """Parameters of a wrong type or out of range."""
    auto = [
        f"optimizer.params.{key} is 'auto': only the Hugging Face Trainer fills it in, write the value"
        for key, value in params.items()
        if value == "auto"
    ]
    try:
        Common.model_validate({key: value for key, value in params.items() if value != "auto"})
    except ValidationError as error:
        return auto + [
            f"optimizer.params.{'.'.join(map(str, problem['loc']))} ({name}): {problem['msg']}, got "
            f"{problem['input']!r}"
            for problem in error.errors()
        ]
    return auto


def _names(name: str, params: Mapping[str, Any]) -> list[str]:
    """Parameters that the optimizer does not have."""
    known = _parameters_of(name, params)
    found = []
    for key in params:
        if key == "max_grad_norm":
            found.append("optimizer.params.max_grad_norm: set gradient_clipping at the top level instead")
        elif known is not None and key not in known:
            closest = closest_name(key, known, cutoff=0.5)
            question = f"; did you mean {closest!r}?" if closest else f". Valid: {', '.join(sorted(known))}"
            found.append(f"optimizer.params.{key} ({name}): unknown key{question}")
    return found


def _parameters_of(name: str, params: Mapping[str, Any]) -> set[str] | None:
    """The parameters of an optimizer other than a method; None if they cannot be known."""
    lower = name.lower()
    if lower == "muon":
        halves = DeepSpeedEngine._MUON_HALF_KEYS + DeepSpeedEngine._ADAM_HALF_KEYS
        return {*halves, "muon_lr", "adam_lr", "per_head_muon", "torch_adam", "adam_w_mode", "foreach"}
    if lower in ADAM:
        more = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
        return more | _keywords(torch.optim.AdamW if params.get("torch_adam") else _fused_adam())
    if lower in DEEPSPEED_OPTIMIZERS and lower != "adagrad":
        return None
    return _keywords(torch.optim.Adagrad if lower == "adagrad" else getattr(torch.optim, name))


def _fused_adam() -> Any:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam


def _keywords(optimizer: Any) -> set[str]:
    return set(inspect.signature(optimizer.__init__).parameters) - {"self", "params"}


def _place(config: Mapping[str, Any], name: str) -> list[str]:
    """Optimizers that do not run here, or that ZeRO does not take."""
    lower = name.lower()
    if lower in KERNELS and get_accelerator().device_name() == "cpu":
        return [f"optimizer.type {name!r} is an extension for GPUs: use another optimizer on a CPU"]
    if lower.startswith("mu") and lower != "muon" and not is_importable("mup"):
        return [f"optimizer.type {name!r} needs mup: pip install mup, or use another optimizer"]
    if zero_stage(config) == 0 or config.get("zero_allow_untested_optimizer") is True:
        return []
    if lower == "lamb" or (lower.startswith("mu") and lower != "muon"):
        untested = True
    else:
        untested = lower not in DEEPSPEED_OPTIMIZERS and getattr(torch.optim, name) not in ZERO_SUPPORTED_OPTIMIZERS
    if not untested:
        return []
    return [f"optimizer.type: DeepSpeed has not tested {name!r} under ZeRO: set zero_allow_untested_optimizer to true"]


def _trial(name: str, params: Mapping[str, Any]) -> list[str]:
    """What the optimizer itself says when it is built and stepped with these parameters; DeepSpeed's are not tried."""
    lower = name.lower()
    parameter = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float32, device="cpu"))
    parameter.grad = torch.zeros_like(parameter)
    if lower in ("adam", "adamw"):
        optimizer: Any = torch.optim.AdamW
        params = {key: value for key, value in params.items() if key in ("lr", "betas", "eps", "weight_decay")}
    elif lower in DEEPSPEED_OPTIMIZERS and lower != "adagrad":
        return []
    else:
        optimizer = torch.optim.Adagrad if lower == "adagrad" else getattr(torch.optim, name)
    try:
        optimizer([parameter], **params).step()
    except Exception as error:  # whatever a foreign constructor raises is an error of the configuration
        return [f"optimizer.params ({name}): {' '.join(str(error).split())}"]
    return []
