"""Parameter groups that give the matrices a rate of their own where the optimizer has no option for it."""

from typing import Any

from torch import nn

from ds_lowrank.methods import METHODS
from ds_lowrank.placement.parameter_names import tag_of, tag_parameters


def matrix_groups(model: nn.Module, optimizer: dict[str, Any], scale: float) -> list[dict[str, Any]]:
    """Two groups: embeddings, head and norms at lr, and the matrices inside the layers at lr * scale.

    A low-rank method has `scale` of its own for exactly these matrices, so a fair dense baseline needs it too. Raises
    ValueError for a method that has it (VLoRP has not).
    """
    method = METHODS.get(optimizer["type"])
    if method is not None and "scale" in method.Options.model_fields:
        raise ValueError(f"--matrix-lr-scale is not for {method.name}: set optimizer.params.scale")
    lr = optimizer["params"]["lr"]
    tag_parameters(model)

    def is_matrix(parameter: nn.Parameter) -> bool:
        # Under zero.Init the tensor is an empty placeholder and the shape stands in ds_shape.
        tag = tag_of(parameter)
        return len(getattr(parameter, "ds_shape", parameter.shape)) == 2 and tag is not None and tag.kind == "weight"

    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if not is_matrix(p)], "lr": lr},
        {"params": [p for p in parameters if is_matrix(p)], "lr": lr * scale},
    ]
