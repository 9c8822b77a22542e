"""Parameter groups that give the layers' matrices their own learning rate, for optimizers without an option for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ds_lowrank.methods import METHODS
from ds_lowrank.placement.parameter_names import tag_of, tag_parameters
from ds_lowrank.placement.zero import unpartitioned_shape


def matrix_groups(model: nn.Module, optimizer: dict[str, Any], scale: float) -> list[dict[str, Any]]:
    """Split a model's parameters into two groups: matrices inside the layers at lr * scale, all others at lr.

    Low-rank methods have an option ``scale`` for exactly these matrices, so a fair dense baseline needs it too.

    Args:
        model: the model; its parameters are tagged.
        optimizer: the ``optimizer`` block of the DeepSpeed configuration.
        scale: the factor on the learning rate of the matrices.

    Raises:
        ValueError: the optimizer has an option ``scale`` (all low-rank methods except VLoRP).
    """
    method = METHODS.get(optimizer["type"])
    if method is not None and "scale" in method.Options.model_fields:
        raise ValueError(f"--matrix-lr-scale is not for {method.name}: set optimizer.params.scale")
    lr = optimizer["params"]["lr"]
    tag_parameters(model)

    def is_matrix(parameter: nn.Parameter) -> bool:
        tag = tag_of(parameter)
        return len(unpartitioned_shape(parameter)) == 2 and tag is not None and tag.kind == "weight"

    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if not is_matrix(p)], "lr": lr},
        {"params": [p for p in parameters if is_matrix(p)], "lr": lr * scale},
    ]
