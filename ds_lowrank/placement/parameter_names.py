from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from ds_lowrank.placement.marks import megatron_stride
from ds_lowrank.placement.tensor_parallel import FUSION, Fusion
from ds_lowrank.placement.zero import unpartitioned_shape

Kind = Literal["weight", "embedding", "head"]


EMBEDDING_NAMES = ("*embed*", "*wte*", "*wpe*")


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


@dataclass(frozen=True)
class Tag:
    """What a parameter is in its model.

    Attributes:
        within: for one of the matrices in a fused weight, the name of that weight.
    """

    name: str
    kind: Kind
    within: str | None = None

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches its name, or that of the weight it is in."""
        return any(matches(name, pattern) for name in (self.name, self.within) if name is not None)


def tag_parameters(model: torch.nn.Module) -> None:
    """Write each parameter's name and kind on it, where DeepSpeed does not lose them.

    Needed before stock ``deepspeed.initialize`` when only :func:`ds_lowrank.register` was called.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    heads = {id(module.weight) for module in output_layers(model)}
    for module in model.modules():
        _mark_fused(module)
    names = logical_names(model)
    for name, parameter in model.named_parameters():
        name = names.get(name, name)
        kind: Kind = (
            "embedding" if id(parameter) in embeddings else "head" if id(parameter) in heads else _kind_of(name)
        )
        parameter.ds_lowrank_tag = Tag(name, kind)  # type: ignore[attr-defined]


def logical_names(model: torch.nn.Module) -> dict[str, str]:
    """Other names for parameters, where a model says what they are called in the model that it is a layout of."""
    names: Callable[[], dict[str, str]] = getattr(model, "logical_names", dict)
    return names()


def tag_fused(parameter: torch.Tensor, heights: Mapping[str, int]) -> None:
    """Declare a weight to be several matrices one below the other: each is then projected on its own.

    Args:
        parameter: ``rows x n``; on a tensor-parallel rank, that rank's rows.
        heights: for each matrix its rows, in order, as often as it takes to fill the weight: ``{"q": 128, "k": 64,
            "v": 64}`` for groups of heads. A name with a dot in it is a whole name, of the weight that it is in an
            unfused model: the two then find the same subspaces.
    """
    setattr(parameter, FUSION, Fusion(tuple(heights), tuple(heights.values())))


def _mark_fused(module: Any) -> None:
    """megatron-core's attention and SwiGLU layers."""
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


def output_layers(model: torch.nn.Module) -> list[Any]:
    """The output head as Hugging Face models name it."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return [head] if head is not None and getattr(head, "weight", None) is not None else []


def tag_of(parameter: torch.Tensor) -> Tag | None:
    """The tag that :func:`tag_parameters` wrote, if it did."""
    tag: Tag | None = getattr(parameter, "ds_lowrank_tag", None)
    return tag


def tag_from_name(name: str) -> Tag:
    """The tag of a parameter of which only the name is known."""
    return Tag(name, _kind_of(name))


def _kind_of(name: str) -> Kind:
    if any(fnmatchcase(name, pattern) for pattern in EMBEDDING_NAMES):
        return "embedding"
    if any(fnmatchcase(name, pattern) for pattern in HEAD_NAMES):
        return "head"
    return "weight"


def matches(name: str, pattern: str) -> bool:
    """A glob matches a parameter's name, its module's name, or one component of it."""
    module = name.rpartition(".")[0]
    return any(fnmatchcase(candidate, pattern) for candidate in (name, module, *name.split(".")))
