"""The names that parameters have without the wrappers around a model or around parts of it.

``torch.compile``, DDP, FSDP, activation checkpointing, PEFT, Lightning and DeepSpeed's engine put a module into an
attribute of their own, which then is part of every name. Seeds, keys of the state and patterns must not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ds_lowrank.errors import ConfigError

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Attributes that only wrappers have: torch.compile, FSDP, activation checkpointing and offloading, Lightning."""
WRAPPERS = {
    "DistributedDataParallel": "module",  # torch's and megatron-core's
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "Float16Module": "module",  # megatron-core
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",  # peft's LoraModel and its like
}
"""Classes whose attribute for the module has a name that a model may use too."""


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside all wrappers around it.

    Args:
        model: wrapped or not.
    """
    while (inner := _wrapped(model)) is not None:
        model = getattr(model, inner)
    return model


def plain_names(model: torch.nn.Module) -> dict[str, str]:
    """The name of every parameter without wrappers, keyed by the name that it has in the model.

    Args:
        model: wrapped or not; any of its modules may be wrapped.

    Raises:
        ConfigError: without wrappers two parameters have the same name.
    """
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for path, plain, module in plain_paths(model):
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name, short = _join(path, attribute), _join(plain, attribute)
            if owners.setdefault(short, name) != name:
                raise ConfigError(
                    f"{owners[short]} and {name} are both {short} without the wrappers around them, and state and "
                    "seeds belong to a name: give one of their modules another name"
                )
            found[name] = short
    return found


def plain_paths(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """Every module: its path in the model, its path without wrappers, and the module.

    Args:
        model: wrapped or not.
    """
    plain: dict[str, str] = {}
    modules: dict[str, torch.nn.Module] = {}
    for path, module in model.named_modules():
        modules[path] = module
        parent, _, attribute = path.rpartition(".")
        if not path:
            plain[path] = ""
        elif attribute == _wrapped(modules[parent]):
            plain[path] = plain[parent]
        else:
            plain[path] = _join(plain[parent], attribute)
        yield path, plain[path], module


def _wrapped(module: torch.nn.Module) -> str | None:
    """The attribute in which a wrapper keeps its module; None if it is no wrapper."""
    own = next((name for name in WRAPPED if module._modules.get(name) is not None), None)
    if own is not None:
        return own
    # By name: the classes belong to packages that may not be installed.
    known = (WRAPPERS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in WRAPPERS)
    return next((name for name in known if module._modules.get(name) is not None), None)


def _join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute
