"""Which parameters of a model are embeddings, belong to output heads, or are vectors stored as a matrix.

The module's type decides, and what the model says of itself. A name decides only where the model says nothing, and
never inside a layer: the ``output`` of an attention is no head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from ds_lowrank.placement.stacks import holds_vectors
from ds_lowrank.placement.wrappers import plain_paths
from ds_lowrank.placement.zero import unpartitioned_shape

Kind = Literal["weight", "embedding", "head", "vectors"]

TABLES = ("*embed*", "*_emb", "emb", "wte", "wpe", "trainable_tokens*")
"""Globs of the names of lookup tables that are a module's own parameters, and so have no type; the last is PEFT's."""
HEADS = (
    "lm_head",
    "embed_out",
    "output_projection",
    "output_layer",
    "output",
    "head",
    "score",
    "classifier",
    "qa_outputs",
)
"""Names of modules, outside of numbered layers, that are output heads where the model does not say so."""
LM_HEADS = HEADS[:2]
"""Those that are never anything else, also within numbered modules such as the layers of a ``PipelineModule``."""


@dataclass(frozen=True)
class Outermost:
    """A Hugging Face model that is in no other.

    Attributes:
        model: the model.
        depth: the number of parts that its own name has.
    """

    model: nn.Module
    depth: int


def kinds_of(model: nn.Module, names: Mapping[str, str]) -> dict[int, Kind]:
    """The kind of every parameter, keyed by the parameter's ``id``. A tied weight is an embedding.

    Args:
        model: the model, wrapped or not.
        names: the name of every parameter in the model without wrappers and parallelism, by its name in this one.
    """
    embeddings, heads = set(_embeddings(model)), set(_heads(model, names))

    def kind_of(name: str, parameter: nn.Parameter) -> Kind:
        if id(parameter) in embeddings:
            return "embedding"
        if id(parameter) in heads:
            return "head"
        return "vectors" if holds_vectors(name, unpartitioned_shape(parameter)) else "weight"

    return {id(parameter): kind_of(name, parameter) for name, parameter in model.named_parameters()}


def kind_of_own_tensor(name: str) -> Kind:
    """The kind of a tensor that is not the weight of a layer, by its name alone.

    Args:
        name: the parameter's full name.
    """
    parts = name.split(".")
    if _is_table(parts[-1]):
        return "embedding"
    return "head" if _is_head_by_name(parts, None) else "weight"


def output_layers(model: nn.Module) -> list[nn.Module]:
    """What the model, and each model in it, returns as its output embeddings: the heads of language models.

    Args:
        model: the model, wrapped or not.
    """
    return list(_told(model, "get_output_embeddings"))


def _told(model: nn.Module, getter: str) -> Iterator[nn.Module]:
    """What the modules return that have a getter of this name."""
    for module in model.modules():
        get = getattr(module, getter, None)
        if callable(get):
            # So do models say that they have none; a method of that name that needs arguments is another one.
            with suppress(NotImplementedError, AttributeError, TypeError):
                found = get()
                if isinstance(found, nn.Module):
                    yield found


def _embeddings(model: nn.Module) -> Iterator[int]:
    """The ``id`` of every parameter that is a lookup table."""
    told = {id(module) for module in _told(model, "get_input_embeddings")}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield from map(id, module.parameters())
        elif (id(module) in told or _is_called(module, "Embedding")) and not _is_linear(module):
            yield id(module._parameters.get("weight"))
        holder = path.rpartition(".")[2] if isinstance(module, nn.ParameterDict | nn.ParameterList) else ""
        for attribute, parameter in module._parameters.items():
            if _is_table(attribute) or _is_table(holder):
                yield id(parameter)


def _is_table(label: str) -> bool:
    return any(fnmatchcase(label, table) for table in TABLES)


def _heads(model: nn.Module, names: Mapping[str, str]) -> Iterator[int]:
    """The ``id`` of every parameter of an output head."""
    for module in output_layers(model):
        yield from map(id, module.parameters())
    inner, outermost = _in_layers(model), _outermost_hugging_face(model)
    for module in model.modules():
        base = _base_of(module)
        is_part = base is not None and outermost[id(module)].model is not module
        if base is not None and (not is_part or output_layers(module)):
            yield from _outside(module, base, inner)
    for path, _, module in plain_paths(model):
        if id(module) in inner:
            continue
        for attribute, parameter in module._parameters.items():
            name = names.get(f"{path}.{attribute}" if path else attribute)
            if name is not None and _is_head_by_name(name.split("."), outermost.get(id(module))):
                yield id(parameter)


def _outside(model: nn.Module, base: nn.Module, inner: set[int]) -> Iterator[int]:
    """The parameters of a Hugging Face model that are in none of its base's modules, nor in a model of their own."""
    skipped = {id(module) for module in base.modules()} | inner | {id(model)}
    for child in model.children():
        for module in child.modules():
            if _is_hugging_face(module):
                skipped |= {id(nested) for nested in module.modules()}
    for module in model.modules():
        if id(module) not in skipped:
            yield from (id(parameter) for parameter in module._parameters.values())


def _is_head_by_name(parts: list[str], outermost: Outermost | None) -> bool:
    """Whether a module on the way to a parameter has the name of a head, and no number comes before it.

    Args:
        parts: the parameter's name, split at its dots.
        outermost: the Hugging Face model that it is in, or None.
    """
    modules = parts[:-1]
    if outermost is not None:
        own = modules[outermost.depth : outermost.depth + 1]
        return _base_of(outermost.model) is None and any(part in HEADS for part in own)
    numbered = next((index for index, part in enumerate(modules) if part.isdecimal()), len(modules))
    return any(part in HEADS for part in modules[:numbered]) or any(part in LM_HEADS for part in modules)


def _outermost_hugging_face(model: nn.Module) -> dict[int, Outermost]:
    """For every module in a Hugging Face model that model, which is in no other."""
    found: dict[int, Outermost] = {}
    for _, plain, module in plain_paths(model):
        if id(module) not in found and _is_hugging_face(module):
            place = Outermost(module, len(plain.split(".")) if plain else 0)
            found |= {id(nested): place for nested in module.modules()}
    return found


def _in_layers(model: nn.Module) -> set[int]:
    """The modules inside an attention, or inside a numbered layer that has one: their linear layers are no heads."""
    attentions = {id(module) for module in model.modules() if _is_called(module, "Attention")}

    def has_any(module: nn.Module, of: set[int]) -> bool:
        return any(id(nested) in of for nested in module.modules())

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    stacks = {id(module) for module in lists if has_any(module, attentions)}
    layers = [layer for module in lists if id(module) in stacks for layer in module if has_any(layer, attentions)]
    layers += [module for module in model.modules() if id(module) in attentions]
    # What has a stack in it is a whole model, whatever its class is called.
    return {id(nested) for layer in layers if not has_any(layer, stacks) for nested in layer.modules()}


def _is_hugging_face(module: nn.Module) -> bool:
    return isinstance(getattr(type(module), "base_model_prefix", None), str)


def _base_of(module: Any) -> nn.Module | None:
    """The body of a Hugging Face model with a head; None if it has no head, or does not say what its body is."""
    base = getattr(module, module.base_model_prefix, None) if _is_hugging_face(module) else None
    return base if isinstance(base, torch.nn.Module) and base is not module else None


def _is_called(module: nn.Module, word: str) -> bool:
    """Whether a word is in the name of the module's class or of one that it is derived from."""
    return any(word in cls.__name__ for cls in type(module).__mro__)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_called(module, "Linear")
