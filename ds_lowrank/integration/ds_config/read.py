"""Finds a DeepSpeed configuration: a dict, or a JSON file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ds_lowrank.errors import ConfigError

COMMENT_SIGNS = ("_", "//", "#")


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration from a JSON file; a byte order mark is skipped.

    Args:
        path: the file.

    Returns:
        The configuration without comments, not validated.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it does not contain one JSON object, or a key appears twice; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a DeepSpeed configuration: name the JSON file in it")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        config = without_comments(json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant))
    except FileNotFoundError:
        raise FileNotFoundError(f"no DeepSpeed configuration at {path}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a valid DeepSpeed configuration: it is not text in UTF-8") from None
    except RecursionError:
        raise ConfigError(f"{path} is not a valid DeepSpeed configuration: it is nested too deeply") from None
    except ValueError as error:
        problem = error if text.strip() else "it is empty"
        raise ConfigError(f"{path} is not a valid DeepSpeed configuration: {problem}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must contain one JSON object, not {json_type(config)}")
    return config


def json_type(value: Any) -> str:
    """What a value is called in JSON, with its article.

    Args:
        value: from a JSON file or a dict.
    """
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def without_comments(value: Any) -> Any:
    """A copy of a configuration without comments.

    JSON has none, so people write them as keys: ``comment``, or a key that begins with ``_``, ``//`` or ``#``.

    Args:
        value: a configuration, or a value in one.
    """
    if isinstance(value, dict):
        return {key: without_comments(inner) for key, inner in value.items() if not _is_comment(key)}
    return value


def _is_comment(key: Any) -> bool:
    return isinstance(key, str) and (key.startswith(COMMENT_SIGNS) or key.lower() == "comment")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1 and not _is_comment(key)]
    if twice:
        raise ValueError(f"key {twice[0]!r} appears twice in one object")
    return dict(pairs)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")
