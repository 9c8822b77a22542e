"""Where a parameter gets its name and kind: a tag on the parameter, which DeepSpeed does not lose.

The tag is written from the model before DeepSpeed takes its parameters. Declared fused weights are marked here too,
because their matrices have names of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from ds_lowrank.placement.kinds import Kind, kind_of_own_tensor, kinds_of
from ds_lowrank.placement.marks import megatron_stride, refuse_uninitialized
from ds_lowrank.placement.stacks import STACK, is_stored_transposed, mark_stacks
from ds_lowrank.placement.tensor_parallel import FUSION, Fusion
from ds_lowrank.placement.wrappers import plain_names, unwrapped
from ds_lowrank.placement.zero import unpartitioned_shape

TAG = "ds_lowrank_tag"
"""The attribute of a parameter that has its :class:`Tag`."""

OF_LAYERS = ("weight", "*.weight", "*weight_orig", "*weight_[gv]", "*parametrizations.weight.*")
"""Globs of the names of layers' weights, which may be pruned, normalised or parametrised."""


@dataclass(frozen=True)
class Tag:
    """What a parameter is in its model.

    Attributes:
        name: its name in the model.
        kind: whether it is an embedding, an output head or any other weight.
        within: for one of the matrices in a fused weight, the name of that weight; otherwise None.
        transposed: whether its layer stores it input x output, so that its columns are the output units.
    """

    name: str
    kind: Kind
    within: str | None = None
    transposed: bool = False

    def matches(self, pattern: str) -> bool:
        """Whether a pattern matches the name, or the name of the fused weight that the matrix is in.

        Args:
            pattern: the glob, as in :func:`matches`.
        """
        return any(matches(name, pattern) for name in (self.name, self.within) if name is not None)


def matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a parameter's name, the name of its module, or one of the components between dots.

    Args:
        name: the parameter's full name.
        pattern: the glob; case-sensitive.
    """
    module = name.rpartition(".")[0]
    return any(fnmatchcase(candidate, pattern) for candidate in (name, module, *name.split(".")))


def tag_parameters(model: torch.nn.Module) -> None:
    """Write each parameter's name and kind on it, where DeepSpeed does not lose them.

    ``ds_lowrank.initialize`` and an optimizer that gets the model call this. Call it before stock
    ``deepspeed.initialize``, after :func:`ds_lowrank.register`.

    Args:
        model: the model, before DeepSpeed wraps it. Other wrappers, such as ``torch.compile`` and DDP, change no name.

    Raises:
        ConfigError: without wrappers two parameters have the same name, or one has no shape yet.
    """
    names = tag_names(model)
    for name, parameter in torch.nn.Module.named_parameters(model):
        refuse_uninitialized(parameter, names[name])
    for module in model.modules():
        _mark_fused(module)
        mark_stacks(module)
    kinds, transposed = kinds_of(model, names), set(_stored_transposed(model))
    for name, parameter in torch.nn.Module.named_parameters(model):  # some wrappers' own method changes names
        tag_as(parameter, Tag(names[name], kinds[id(parameter)], transposed=id(parameter) in transposed))


def tag_as(parameter: torch.Tensor, tag: Tag) -> None:
    """Write a tag on a parameter, for one that is in no model.

    Args:
        parameter: any.
        tag: what it is.
    """
    setattr(parameter, TAG, tag)


def tag_of(parameter: torch.Tensor) -> Tag | None:
    """The tag that was written on a parameter; None if it has none."""
    tag: Tag | None = getattr(parameter, TAG, None)
    return tag


def tag_of_own_tensor(name: str, parameter: torch.Tensor) -> Tag | None:
    """Make a tag for a named parameter that nothing was written on, if it is not that of a layer.

    Args:
        name: the parameter's.
        parameter: of any shape; a declared stack has the kind of its matrices.

    Returns:
        None for a weight of a layer, or of several: only the layer's type tells what it is. Vectors are never
        projected, and a matrix of any other name is what :func:`tag_parameters` would say of a module's own tensor.
    """
    dimensions = len(unpartitioned_shape(parameter)) - hasattr(parameter, STACK)
    is_matrix_of_a_layer = dimensions == 2 and any(fnmatchcase(name, layer) for layer in OF_LAYERS)
    return None if is_matrix_of_a_layer or dimensions > 2 else Tag(name, kind_of_own_tensor(name))


def tag_fused(parameter: torch.Tensor, heights: Mapping[str, int]) -> None:
    """Declare that a weight is several matrices stacked along rows; each is then projected on its own.

    Args:
        parameter: ``rows x n``; on a tensor-parallel rank, that rank's rows.
        heights: the number of rows of each matrix, in order; the sequence repeats until the weight is filled:
            ``{"q": 128, "k": 64, "v": 64}`` for groups of heads. A name with a dot in it is a full name: that of the
            weight in a model that is not fused. Both models then find the same subspaces.
    """
    setattr(parameter, FUSION, Fusion(tuple(heights), tuple(heights.values())))


def logical_names(model: torch.nn.Module) -> dict[str, str]:
    """Map parameter names to the names of the model without pipeline or tensor parallelism.

    Args:
        model: may have a ``logical_names`` method that returns this mapping.

    Returns:
        The mapping; empty if the model's own names are used.
    """
    names: Callable[[], dict[str, str]] = getattr(model, "logical_names", dict)
    return names()


def stores_transposed(module: torch.nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear layer, as in GPT-2, whose weight is input x output."""
    return any(
        (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D") for cls in type(module).__mro__
    )


def _stored_transposed(model: torch.nn.Module) -> Iterator[int]:
    """The ``id`` of every parameter whose matrices are stored input x output."""
    for module in model.modules():
        if stores_transposed(module):  # pruned, normalised or parametrised too
            yield from (id(weight) for weight in module.parameters() if len(unpartitioned_shape(weight)) == 2)
        for name, parameter in module._parameters.items():
            if hasattr(parameter, STACK) and is_stored_transposed(module, name):
                yield id(parameter)


def tag_names(model: torch.nn.Module) -> dict[str, str]:
    """The name in its tag of every parameter, keyed by its name in the model: without wrappers and parallelism.

    Args:
        model: wrapped or not.

    Raises:
        ConfigError: without wrappers two parameters have the same name.
    """
    given = logical_names(unwrapped(model))
    return {name: given.get(plain, plain) for name, plain in plain_names(model).items()}


def _mark_fused(module: Any) -> None:
    """Declare the fused weights of megatron-core's attention and SwiGLU layers."""
    qkv = getattr(getattr(module, "linear_qkv", None), "weight", None)
    if qkv is not None and hasattr(module, "num_query_groups_per_partition") and not hasattr(qkv, FUSION):
        head = module.hidden_size_per_attention_head
        queries = module.num_attention_heads_per_partition // module.num_query_groups_per_partition
        gated = getattr(getattr(module, "config", None), "attention_output_gate", False)
        gate = {"gate": queries * head} if gated else {}
        tag_fused(qkv, {"q": queries * head, **gate, "k": head, "v": head})
    fc1 = getattr(getattr(module, "linear_fc1", None), "weight", None)
    if fc1 is not None and megatron_stride(fc1) == 2 and not hasattr(fc1, FUSION):
        half = unpartitioned_shape(fc1)[0] // 2
        tag_fused(fc1, {"gate": half, "up": half})
