"""Where a parameter gets its name and kind: a tag on the parameter, which DeepSpeed does not lose.

The tag is written from the model before DeepSpeed takes its parameters. Declared fused weights are marked here too,
because their matrices have names of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from ds_lowrank.placement.marks import megatron_stride
from ds_lowrank.placement.stacks import holds_vectors, mark_stacks
from ds_lowrank.placement.tensor_parallel import FUSION, Fusion
from ds_lowrank.placement.zero import unpartitioned_shape

Kind = Literal["weight", "embedding", "head", "vectors"]

EMBEDDING_NAMES = ("*embed*", "*wte*", "*wpe*")
"""Globs of names that are taken for embeddings where the model does not say so."""
HEAD_NAMES = (
    "*lm_head*",
    "*embed_out*",
    "*output_projection*",
    "head.*",
    "*.head.*",
    "*.output.weight",
    "output.weight",
    "*output_layer*",
    "score.*",
    "classifier.*",
    "*.score.*",
    "*.classifier.*",
    "qa_outputs.*",
    "*.qa_outputs.*",
)
"""Globs of names that are taken for output heads where the model does not say so."""


@dataclass(frozen=True)
class Tag:
    """What a parameter is in its model.

    Attributes:
        name: its name in the model.
        kind: whether it is an embedding, an output head or any other weight.
        within: for one of the matrices in a fused weight, the name of that weight; otherwise None.
    """

    name: str
    kind: Kind
    within: str | None = None

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

    ``ds_lowrank.initialize`` calls this. Call it before stock ``deepspeed.initialize``, after
    :func:`ds_lowrank.register`.

    Args:
        model: the model, before DeepSpeed wraps it.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    heads = {id(module.weight) for module in output_layers(model)}
    for module in model.modules():
        _mark_fused(module)
        mark_stacks(module)
    names = logical_names(model)
    for name, parameter in model.named_parameters():
        name = names.get(name, name)
        kind: Kind = (
            "embedding" if id(parameter) in embeddings else "head" if id(parameter) in heads else _kind_of(name)
        )
        if kind == "weight" and holds_vectors(name, unpartitioned_shape(parameter)):
            kind = "vectors"
        parameter.ds_lowrank_tag = Tag(name, kind)  # type: ignore[attr-defined]


def tag_of(parameter: torch.Tensor) -> Tag | None:
    """The tag that :func:`tag_parameters` wrote on a parameter; None if it has none."""
    tag: Tag | None = getattr(parameter, "ds_lowrank_tag", None)
    return tag


def tag_from_name(name: str) -> Tag:
    """Make a tag from a parameter's name alone, for an optimizer that is built from named parameters.

    Args:
        name: the parameter's full name; it decides the kind too.
    """
    return Tag(name, _kind_of(name))


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


def output_layers(model: torch.nn.Module) -> list[Any]:
    """The output head of a Hugging Face model.

    Args:
        model: the model; ``get_output_embeddings`` is called if it has one.

    Returns:
        The head, as a list; empty if there is none or it has no weight.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return [head] if head is not None and getattr(head, "weight", None) is not None else []


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


def _kind_of(name: str) -> Kind:
    """Guess the kind of a parameter from its name."""
    if any(fnmatchcase(name, pattern) for pattern in EMBEDDING_NAMES):
        return "embedding"
    if any(fnmatchcase(name, pattern) for pattern in HEAD_NAMES):
        return "head"
    return "weight"
