"""Adding adapters in GradNormLoRP's parametrization (arXiv 2412.19616) to a model, and merging them again.

This works for any model with ``torch.nn.Linear`` layers, whether or not it was built under ``zero.Init``. Linear layers
get adapters, newly initialised task heads stay trainable, and everything else is frozen. Merging restores the original
architecture and parameter names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor

from ds_lowrank.adapters.linear import AdapterLinear, NormAxis
from ds_lowrank.errors import ConfigError
from ds_lowrank.optimizer.roles import check_patterns, role_of
from ds_lowrank.placement.kinds import kinds_of, output_layers
from ds_lowrank.placement.marks import is_partitioned
from ds_lowrank.placement.parameter_names import Tag, matches, stores_transposed, tag_names, tag_parameters

__all__ = ["TASK_HEADS", "AdapterLinear", "add_adapters", "has_adapters", "merge_adapters", "merged_weights"]

TASK_HEADS = ("score", "classifier", "qa_outputs")
"""Hugging Face's names for the heads of classification models, which pre-trained checkpoints do not contain."""
ADAPTER_PARAMETERS = ("lora_A", "lora_B", "magnitude")


def add_adapters(
    model: torch.nn.Module,
    *,
    adapter_rank: int = 8,
    adapter_alpha: float = 16.0,
    adapter_dropout: float = 0.0,
    norm_axis: NormAxis = "output",
    detach_norm: bool = False,
    target_modules: Sequence[str] | None = None,
    exclude_modules: Sequence[str] = (),
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Replace linear layers by :class:`AdapterLinear`, in place. Collective at ZeRO 3.

    The model's outputs do not change at first. Patterns are globs that are matched against the name of a layer's
    weight, the name of the layer, and each component of it.

    Args:
        model: the model to modify.
        adapter_rank: rank r of the factors A (r x n) and B (m x r).
        adapter_alpha: the low-rank part is scaled by s = adapter_alpha / adapter_rank.
        adapter_dropout: dropout probability on the input of A, at least 0 and below 1.
        norm_axis: ``output`` for one magnitude per output unit, ``input`` for one per input unit.
        detach_norm: whether the norm in ``g V / |V|`` counts as a constant in the backward pass, as in peft's DoRA.
        target_modules: patterns of the layers to replace; None for every linear layer except the output head.
        exclude_modules: patterns of layers that are frozen and not replaced; they take precedence over the targets.
        modules_to_save: patterns of modules that are trained and not replaced; they take precedence over the targets.
            None for the heads of a model without a language-model head, and for :data:`TASK_HEADS` in any other.
        seed: seeds the factors A, together with each layer's name.

    Returns:
        The names of the replaced layers.

    Raises:
        ConfigError: an option is invalid, a pattern matches nothing, there is no layer to replace, the rank is above a
            layer's dimensions, a weight is shared with another module, or the model already has adapters. The model
            is then unchanged.
    """
    _check_options(adapter_rank, adapter_alpha, adapter_dropout, norm_axis)
    if has_adapters(model):
        raise ConfigError("the model already has adapters: call merge_adapters first, or do not add them twice")
    saved = _saved(model, modules_to_save)
    _check_transposed(model, saved, target_modules, exclude_modules)
    linears = _linears(model)
    weights = [f"{name}.weight" for name in linears]
    if not linears:
        raise ConfigError(
            "adapters: the model contains no torch.nn.Linear, the only kind of layer that they can replace"
        )
    check_patterns(weights, "target_modules", target_modules or ())
    check_patterns(weights, "exclude_modules", exclude_modules)
    check_patterns([name for name, _ in model.named_parameters()], "modules_to_save", modules_to_save or ())
    chosen = _chosen(model, linears, target_modules, exclude_modules, saved)
    if not chosen:
        raise ConfigError(
            "adapters: no linear layer is left to replace, as exclude_modules and modules_to_save take precedence over "
            f"target_modules; name some of these in target_modules: {', '.join(list(linears)[:6])}, ..."
        )
    _check_layers(model, chosen, adapter_rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name in saved)
    adapters = {}
    for name, linear in chosen.items():
        with _gathered([linear.weight]):
            adapters[id(linear)] = AdapterLinear(
                linear, name, adapter_rank, adapter_alpha, adapter_dropout, norm_axis, seed, detach_norm
            )
    _replace(model, adapters)
    tag_parameters(model)
    return list(chosen)


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether the model has adapters from :func:`add_adapters`."""
    return any(isinstance(module, AdapterLinear) for module in model.modules())


def merged_weights(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the parameters of the original architecture from gathered parameters of a model with adapters.

    Args:
        model: the model; its own parameters are not read. Without adapters, the weights are returned unchanged.
        weights: all of its parameters, whole, keyed by name.

    Returns:
        The parameters without A, B and g, in which W = g V / |V| replaces W0, in the dtype of W0.
    """
    merged = dict(weights)
    for name, layer in _adapters(model):
        factors = [merged.pop(f"{name}.{factor}") for factor in ADAPTER_PARAMETERS]
        merged[f"{name}.weight"] = layer.merged(merged[f"{name}.weight"], *factors)
    return merged


@torch.no_grad()
def merge_adapters(model: torch.nn.Module) -> None:
    """Replace every adapter by an equivalent ``torch.nn.Linear``, in place. Frozen parameters stay frozen.

    Args:
        model: the model to modify.

    Raises:
        ConfigError: the weights are partitioned over ranks, as at ZeRO 3.
    """
    layers = dict(_adapters(model))
    if any(is_partitioned(layer.weight) for layer in layers.values()):
        raise ConfigError(
            "merge_adapters needs whole weights, but at ZeRO 3 they are partitioned: gather them with "
            "deepspeed.zero.GatheredParameters and pass them to merged_weights"
        )
    linears = {}
    for layer in layers.values():
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        merged = layer.merged(layer.weight, layer.lora_A, layer.lora_B, layer.magnitude)
        linear.weight = torch.nn.Parameter(merged, requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        linears[id(layer)] = linear.train(layer.training)
    _replace(model, linears)


def _linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Layers that can be replaced. Subclasses are left out: they may compute something else or bypass ``forward``."""
    return {name: module for name, module in model.named_modules() if name and type(module) is torch.nn.Linear}


def _saved(model: torch.nn.Module, patterns: Sequence[str] | None) -> set[str]:
    """The parameters that are trained as they are: those that patterns match, by default the task heads."""
    names = [name for name, _ in model.named_parameters()]
    if patterns is None:
        kinds = kinds_of(model, tag_names(model))
        heads = [name for name, parameter in model.named_parameters() if kinds[id(parameter)] == "head"]
        if not output_layers(model):
            return set(heads)
        names, patterns = heads, TASK_HEADS
    return {name for name in names if any(matches(name, pattern) for pattern in patterns)}


def _chosen(
    model: torch.nn.Module,
    linears: Mapping[str, torch.nn.Linear],
    targets: Sequence[str] | None,
    excludes: Sequence[str],
    saved: Collection[str],
) -> dict[str, torch.nn.Linear]:
    """The layers to replace, chosen like projected parameters."""
    kinds = kinds_of(model, tag_names(model))

    def is_chosen(name: str, linear: torch.nn.Linear) -> bool:
        tag, shape = Tag(name, kinds[id(linear.weight)]), (linear.out_features, linear.in_features)
        return name not in saved and role_of(tag, shape, targets, excludes).projected

    return {name: linear for name, linear in linears.items() if is_chosen(f"{name}.weight", linear)}


def _check_transposed(
    model: torch.nn.Module, saved: set[str], targets: Sequence[str] | None, excludes: Sequence[str]
) -> None:
    """Refuse to freeze a linear layer that should have an adapter and cannot."""
    transposed = [name for name, module in model.named_modules() if stores_transposed(module)]
    for name in transposed:
        tag = Tag(f"{name}.weight", "weight")
        if tag.name not in saved and role_of(tag, (1, 1), targets, excludes).projected:
            raise ConfigError(
                f"adapters: {name} is a Conv1D of transformers, and only torch.nn.Linear can have an adapter: set "
                "parametrization to 'full', or exclude the layer"
            )


def _adapters(model: torch.nn.Module) -> Iterator[tuple[str, AdapterLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdapterLinear))


def _replace(model: torch.nn.Module, replacements: Mapping[int, torch.nn.Module]) -> None:
    """Replace modules, under every name that they have. ``replacements`` is keyed by the ``id`` of the old module."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def _check_options(rank: Any, alpha: Any, dropout: Any, norm_axis: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"adapter_rank: {rank!r} must be a whole number of at least 1")
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"adapter_alpha: {alpha!r} must be above 0 and finite")
    if not 0 <= dropout < 1:
        raise ConfigError(f"adapter_dropout: {dropout!r} must be at least 0 and below 1")
    if norm_axis not in get_args(NormAxis):
        raise ConfigError(f"norm_axis: {norm_axis!r} must be 'output' or 'input'")


def _check_layers(model: torch.nn.Module, linears: Mapping[str, torch.nn.Linear], rank: int) -> None:
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, linear in linears.items():
        largest = min(linear.in_features, linear.out_features)
        if rank > largest:
            raise ConfigError(
                f"adapter_rank {rank} is above a dimension of {name} ({linear.out_features} x {linear.in_features}): "
                f"at most {largest}, or put the layer in exclude_modules"
            )
        if owners[id(linear.weight)] > 1:
            raise ConfigError(
                f"{name}: another module shares its weight and would not use the adapter; put it in exclude_modules"
            )
        if linear.weight.is_meta:
            raise ConfigError(f"{name}: its weight is on the meta device; load the weights before adding adapters")


def _gathered(parameters: list[Tensor]) -> AbstractContextManager[Any]:
    """A context in which parameters that ZeRO 3 has partitioned are whole."""
    if not any(is_partitioned(parameter) for parameter in parameters):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
    return context
