"""Validates ``optimizer.type`` and ``optimizer.params``; errors suggest the valid name closest to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from pydantic import ValidationError

from ds_lowrank.errors import ConfigError, closest_name
from ds_lowrank.methods import METHODS
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.options import Options


def method_named(name: str) -> type[Method]:
    """The method with the given name.

    Args:
        name: as in ``optimizer.type``.

    Raises:
        ConfigError: there is no such method; the message suggests the closest name.
    """
    if name not in METHODS:
        raise ConfigError(f"optimizer.type: {name!r} is not a method of ds_lowrank{_suggestion(name, METHODS)}")
    return METHODS[name]


def looks_like_method(name: str) -> str | None:
    """The method that an ``optimizer.type`` is probably a misspelling of.

    Args:
        name: an ``optimizer.type`` that is not a method.

    Returns:
        The name of the method; None if the name resembles none, or is that of an optimizer in ``torch.optim``.
    """
    if name.lower() in (known.lower() for known in dir(torch.optim)):
        return None
    return closest_name(name, METHODS, cutoff=0.75)


def parse_options(method: type[Method], params: Mapping[str, Any]) -> Options:
    """Validate ``optimizer.params``, or the options of one parameter group.

    Args:
        method: the method whose options they are.
        params: option names and values.

    Returns:
        The options, with defaults for what was not given.

    Raises:
        ConfigError: a key is unknown (the message suggests the closest valid one), or a value is invalid.
    """
    for key, value in params.items():
        if isinstance(value, Iterator):  # whoever reads it second would find nothing in it
            raise ConfigError(f"optimizer.params.{key} ({method.name}): a list, not a {type(value).__name__}")
    try:
        return method.Options.model_validate(dict(params))
    except ValidationError as error:
        raise ConfigError("\n".join(_message(method, problem) for problem in error.errors())) from None


def _message(method: type[Method], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    where = f"optimizer.params{key and '.' + key} ({method.name})"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{_suggestion(key, method.Options.model_fields)}"
    if problem["input"] == "auto":
        return f"{where}: only the Hugging Face Trainer fills in 'auto'; write the value"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}" + (f", got {problem['input']!r}" if problem["loc"] else "")
    return f"{where}: {problem['msg']}, got {problem['input']!r}"


def _suggestion(wrong: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    closest = closest_name(wrong, names, cutoff=0.5)
    question = f"; did you mean {closest!r}?" if closest else "."
    return f"{question} Valid: {', '.join(names)}"
