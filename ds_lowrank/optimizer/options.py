"""``optimizer.type`` and ``optimizer.params``: names, validation, and errors that name the nearest valid key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from pydantic import ValidationError

from ds_lowrank.errors import ConfigError
from ds_lowrank.methods import METHODS
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.options import Options


def method_named(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        ConfigError: there is none; says which is nearest.
    """
    if name not in METHODS:
        raise ConfigError(f"optimizer.type: {name!r} is not a method of ds_lowrank{_hint(name, METHODS)}")
    return METHODS[name]


def looks_like_method(name: str) -> str | None:
    """The method that a misspelt ``optimizer.type`` means, if it is that near to one and no optimizer of torch's."""
    if name.lower() in (known.lower() for known in dir(torch.optim)):
        return None
    folded = {known.lower(): known for known in METHODS}
    near = get_close_matches(name.lower(), folded, n=1, cutoff=0.75)
    return folded[near[0]] if near else None


def parse_options(method: type[Method], params: Mapping[str, Any]) -> Options:
    """Validate ``optimizer.params``.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named) or a value out of range.
    """
    try:
        return method.Options.model_validate(dict(params))
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(method, problem) for problem in error.errors())) from None


def _complaint(method: type[Method], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    where = f"optimizer.params{key and '.' + key} ({method.name})"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{_hint(key, method.Options.model_fields)}"
    if problem["input"] == "auto":
        return f"{where}: 'auto' is filled in by the Hugging Face Trainer only; write the value"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}" + (f", got {problem['input']!r}" if problem["loc"] else "")
    return f"{where}: {problem['msg']}, got {problem['input']!r}"


def _hint(wrong: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    folded = {name.lower(): name for name in names}
    near = get_close_matches(wrong.lower(), folded, n=1, cutoff=0.5)
    suggestion = f"; did you mean {folded[near[0]]!r}?" if near else "."
    return f"{suggestion} Valid: {', '.join(names)}"
