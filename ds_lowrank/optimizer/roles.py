"""Which parameters are projected: decided by name, by the type of their module and by their logical shape.

ZeRO hands an optimizer nameless tensors, so :func:`tag_parameters` writes name and kind on each parameter beforehand
(``ds_lowrank.initialize`` calls it). Shape alone cannot tell an embedding from a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ds_lowrank.errors import ConfigError
from ds_lowrank.placement.parameter_names import Tag, matches


@dataclass(frozen=True)
class Role:
    """How a parameter is trained, and why."""

    projected: bool
    reason: str


def role_of(tag: Tag, shape: tuple[int, ...], targets: Iterable[str] | None, excludes: Iterable[str]) -> Role:
    """Decide one parameter's role.

    Args:
        tag: its name and kind.
        shape: its logical shape.
        targets: globs of ``target_modules``; None for the default rule.
        excludes: globs of ``exclude_modules``; they win over the targets.
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
    """Every pattern must match something.

    Args:
        names: of the parameters it may match.
        key: where the patterns were given, for the message.
        patterns: globs.

    Raises:
        ConfigError: naming the pattern and some names it could have meant.
    """
    known = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in known):
            raise ConfigError(
                f"{key}: {pattern!r} matches no parameter. Patterns are globs on the parameter's name, its module's "
                f"name or one component of it, for example '*_proj'. Names here: {', '.join(known[:6])}, ..."
            )
