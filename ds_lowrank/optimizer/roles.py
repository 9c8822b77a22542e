"""Decides which parameters are projected, by their name, the type of their module and their logical shape.

A shape alone cannot tell an embedding from a weight, and ZeRO gives an optimizer tensors without names. Therefore
:func:`ds_lowrank.tag_parameters`, which ``ds_lowrank.initialize`` calls, writes name and kind on each parameter before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.parameter_names import Tag, matches


@dataclass(frozen=True)
class Role:
    """How a parameter is trained, and why.

    Attributes:
        projected: whether the method steps it; otherwise AdamW does.
        reason: why, in a few words for the role table.
    """

    projected: bool
    reason: str


def role_of(tag: Tag, shape: tuple[int, ...], targets: Iterable[str] | None, excludes: Iterable[str]) -> Role:
    """Decide whether one parameter is projected, by its name and shape.

    Args:
        tag: the parameter's name and kind.
        shape: its logical shape.
        targets: globs of ``target_modules``; None for the default rule, which projects every matrix that is neither an
            embedding nor an output head.
        excludes: globs of ``exclude_modules``, which take precedence over the targets.
    """
    if len(shape) != 2:
        return Role(False, f"{len(shape)}-D")
    for pattern in excludes:
        if tag.matches(pattern):
            return Role(False, f"exclude_modules {pattern!r}")
    if targets is None:
        return Role(tag.kind == "weight", "matrix" if tag.kind == "weight" else tag.kind)
    for pattern in targets:
        if tag.matches(pattern):
            return Role(True, f"target_modules {pattern!r}")
    return Role(False, "not in target_modules")


def check_patterns(names: Iterable[str], key: str, patterns: Iterable[str]) -> None:
    """Refuse a pattern that matches no parameter.

    Args:
        names: of all parameters that a pattern may match.
        key: the option that the patterns come from, for the message.
        patterns: globs.

    Raises:
        ConfigError: a pattern matches nothing; the message has the pattern and some of the names.
    """
    known = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in known):
            raise ConfigError(
                f"{key}: {pattern!r} matches no parameter. Patterns are globs on the parameter's name, its module's "
                f"name or one component of it, for example '*_proj'. Names in this model: {', '.join(known[:6])}, ..."
            )
