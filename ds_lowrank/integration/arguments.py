"""The arguments of ``deepspeed.initialize``, from wherever a caller gives them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

from ds_lowrank.errors import ConfigError
from ds_lowrank.integration.ds_config.read import json_type, read_file


def settings_of(args: Any, config: str | dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """The DeepSpeed configuration as a dict, not validated, and what messages call it.

    Args:
        args: the command line's, with ``deepspeed_config``, the path of a JSON file, or without.
        config: a dict, or the path of a JSON file.

    Raises:
        ConfigError: it is given twice, or not at all, or its file is not valid.
    """
    path = getattr(args, "deepspeed_config", None)
    if config is not None and path is not None:
        raise ConfigError(
            "the DeepSpeed configuration was given twice: as config and as args.deepspeed_config; pass one"
        )
    source = config if config is not None else path
    if source is None:
        raise ConfigError("no DeepSpeed configuration: pass config=..., or --deepspeed_config on the command line")
    if isinstance(source, dict):
        return source, "the DeepSpeed configuration"
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"the DeepSpeed configuration must be a dict or the path of a file, not {json_type(source)}")
    return _read(os.fspath(source)), str(source)


def _read(source: str) -> dict[str, Any]:
    """Read a file. DeepSpeed itself also takes Hjson, which is JSON with comments, and base64."""
    import deepspeed

    if os.path.exists(source):
        try:
            return read_file(source)
        except ConfigError as error:
            try:
                settings: dict[str, Any] = deepspeed.load_ds_config(source)
            except Exception:
                raise error from None
    else:
        settings = deepspeed.load_ds_config(source)
    if not isinstance(settings, dict):
        raise ConfigError(f"{source} must contain one JSON object, not {json_type(settings)}")
    return settings


def without_path(args: Any) -> Any:
    """The command line's arguments without ``deepspeed_config``: DeepSpeed refuses a configuration given twice.

    Args:
        args: the command line's, or None.

    Returns:
        ``args`` itself if it has no ``deepspeed_config``, else a changed copy.
    """
    if getattr(args, "deepspeed_config", None) is None:
        return args
    args = copy.copy(args)
    args.deepspeed_config = None
    return args


def plain_parameters(parameters: Iterable[Any] | None) -> list[Any] | None:
    """Parameters or groups as DeepSpeed takes them, without names. The names are in the parameters' tags.

    Args:
        parameters: parameters, ``(name, parameter)`` pairs or groups; None for all of the model's.
    """
    if parameters is None:
        return None
    return [entry[1] if isinstance(entry, tuple) else entry for entry in parameters]
