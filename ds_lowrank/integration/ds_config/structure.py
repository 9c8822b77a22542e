"""Compares a configuration with the keys, types and ranges of :mod:`ds_lowrank.integration.ds_config.schema`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import deepspeed.runtime.config
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import BaseModel, TypeAdapter, ValidationError

from ds_lowrank.errors import closest_name
from ds_lowrank.integration.ds_config.read import json_type
from ds_lowrank.integration.ds_config.schema import RANGES, Settings

REMOVED: Mapping[str, str] = {
    **getattr(deepspeed.runtime.config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}),
    **{
        f"zero_optimization.{key}": reason
        for key, reason in getattr(deepspeed.runtime.config, "_REMOVED_ZERO_CONFIG_KEYS", {}).items()
    },
}
"""Keys that DeepSpeed once had, with what it says about them."""


@dataclass
class Findings:
    """What is wrong with a configuration.

    Attributes:
        problems: one sentence each, which begins with the key.
        auto: keys that are left ``"auto"`` where DeepSpeed cannot use it.
        unset: keys that are left ``"auto"`` where DeepSpeed takes its default instead.
    """

    problems: list[str] = field(default_factory=list)
    auto: list[str] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)


def compare(settings: Mapping[str, Any]) -> Findings:
    """Compare a configuration with the keys and types that DeepSpeed knows.

    Args:
        settings: the configuration, without comments.
    """
    found = Findings()
    _compare_block(Settings, settings, "", found)
    return found


def _compare_block(model: type[BaseModel], given: Mapping[str, Any], path: str, found: Findings) -> None:
    """Compare one object with its model, and what it contains with theirs."""
    known = _fields(model)
    before = len(found.problems)
    for key, value in given.items():
        at = f"{path}.{key}" if path else str(key)
        if at in REMOVED:
            found.problems.append(f"{at}: {REMOVED[at]}")
        elif key not in known:
            found.problems.append(f"{at}: unknown key{_did_you_mean(str(key), known)}")
        else:
            _compare_value(known[key], value, at, issubclass(model, DeepSpeedConfigModel), found)
    missing = [key for key, info in model.model_fields.items() if info.is_required() and key not in given]
    found.problems += [f"{path}.{key} is missing" for key in missing]
    if len(found.problems) == before:
        found.problems += _refused_by(model, given, path)


def _compare_value(annotation: Any, value: Any, at: str, drops_auto: bool, found: Findings) -> None:
    blocks, plain = _split(annotation)
    if isinstance(value, Mapping) and blocks:
        _compare_block(blocks[0], value, at, found)
    elif isinstance(value, float) and not math.isfinite(value):
        if at != "steps_per_print":  # accelerate writes infinity there, for never
            found.problems.append(f"{at} must be a finite number, not {value}")
    elif plain is None or (problem := _type_problem(plain, value)) is not None:
        if value == "auto" and not blocks:
            (found.unset if drops_auto else found.auto).append(at)
        elif blocks:
            found.problems.append(f"{at} must be an object in braces, not {json_type(value)}")
        elif not (drops_auto and isinstance(value, str) and get_origin(plain) is list):
            found.problems.append(f"{at}: {problem}")  # DeepSpeed takes a string for a list of it in some blocks
    elif at in RANGES and not RANGES[at][0] <= value <= RANGES[at][1]:
        low, high = RANGES[at]
        found.problems.append(
            f"{at} must be at least {low}{'' if high == math.inf else f' and at most {high}'}, not {value}"
        )


@cache
def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """The types of a model's keys, by name and by alias."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        annotation = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
        found[name] = annotation
        if info.alias is not None:
            found[info.alias] = annotation
    return found


def _split(annotation: Any) -> tuple[list[type[BaseModel]], Any]:
    """The models in a type, and what remains without them; None if nothing does."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    blocks = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    plain = [part for part in parts if part not in blocks]
    return blocks, Union[tuple(plain)] if plain else None  # noqa: UP007


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config={"arbitrary_types_allowed": True})


def _type_problem(annotation: Any, value: Any) -> str | None:
    """Why a value has the wrong type or is out of range, or None. Types are JSON's: ``"1"`` and true are no numbers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 5e8 is how DeepSpeed's own examples write whole numbers
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        return None  # an object of Python in a dict, such as a process group: DeepSpeed checks it
    if isinstance(value, bool) and isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"Input should be a number, got {value}"  # true would be taken for 1
    try:
        _adapter(annotation).validate_json(text, strict=True)
    except ValidationError as error:
        messages = list(dict.fromkeys(_message(problem) for problem in error.errors()))
        return f"{' or '.join(messages)}, got {value!r}{_without_quotes(annotation, value)}"
    return None


def _message(problem: Any) -> str:
    if problem["type"] == "needs_python_object":
        return "cannot be set in JSON, remove it"
    return re.sub(r", (\w+) or \1\b", r" or \1", problem["msg"])  # an enumeration with two names for one value


def _without_quotes(annotation: Any, value: Any) -> str:
    """Advice for a number or boolean that was written as a string."""
    if not isinstance(value, str):
        return ""
    try:
        meant = json.loads(value.lower())
        _adapter(annotation).validate_python(meant)
    except ValueError:  # ValidationError is one
        return ""
    return f": this is a string, write {value.lower()} without quotes"


def _refused_by(model: type[BaseModel], given: Mapping[str, Any], path: str) -> list[str]:
    """What DeepSpeed's own class says against a block whose keys and types are right."""
    if not issubclass(model, DeepSpeedConfigModel):
        return []
    try:
        model(**given)
    except ValidationError as error:
        return [_sentence(problem, path) for problem in error.errors()]
    except (AssertionError, TypeError, ValueError) as error:
        return [f"{path}: {error}"]
    return []


def _sentence(problem: Any, path: str) -> str:
    at = ".".join((path, *map(str, problem["loc"])))
    cause = problem.get("ctx", {}).get("error")
    return f"{at}: {cause or problem['msg']}" + (f", got {problem['input']!r}" if problem["loc"] else "")


def _did_you_mean(wrong: str, known: Mapping[str, Any]) -> str:
    closest = closest_name(wrong, known, cutoff=0.5)
    return f"; did you mean {closest!r}?" if closest else f". Valid: {', '.join(sorted(known))}"
