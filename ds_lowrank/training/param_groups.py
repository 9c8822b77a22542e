"""A model's parameters: how many are trained, and groups that give the layers' matrices their own learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.placement.parameter_names import tag_of, tag_parameters
from ds_lowrank.placement.zero import unpartitioned_shape


def matrix_groups(model: nn.Module, optimizer: dict[str, Any], scale: float) -> list[dict[str, Any]]:
    """Split a model's trained parameters into two groups: matrices inside the layers at lr * scale, all others at lr.

    Low-rank methods have an option ``scale`` for exactly these matrices, so a fair dense baseline needs it too.

    Args:
        model: the model; its parameters are tagged.
        optimizer: the ``optimizer`` block of the DeepSpeed configuration.
        scale: the factor on the learning rate of the matrices.

    Raises:
        ValueError: the optimizer has an option for that, ``scale`` (of VLoRP it is another thing).
    """
    low_rank = OPTIMIZERS.get(optimizer["type"])
    options = None if low_rank is None else low_rank.method.Options
    if options is not None and options.rate_key in options.model_fields:
        raise ValueError(f"--matrix-lr-scale is not for {optimizer['type']}: set optimizer.params.{options.rate_key}")
    lr = optimizer["params"]["lr"]
    tag_parameters(model)

    def is_matrix(parameter: nn.Parameter) -> bool:
        tag = tag_of(parameter)
        return len(unpartitioned_shape(parameter)) == 2 and tag is not None and tag.kind == "weight"

    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if not is_matrix(p)], "lr": lr},
        {"params": [p for p in parameters if is_matrix(p)], "lr": lr * scale},
    ]


def trainable_parameters(model: nn.Module) -> int:
    """The number of trainable scalars in the whole model, at every ZeRO stage."""
    return sum(math.prod(unpartitioned_shape(p)) for p in model.parameters() if p.requires_grad)
