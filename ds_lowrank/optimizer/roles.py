"""Decides which parameters are projected, by their name, the type of their module and their logical shape.

A shape alone cannot tell an embedding from a weight, and ZeRO gives an optimizer tensors without names. Therefore
:func:`ds_lowrank.tag_parameters`, which ``ds_lowrank.initialize`` calls, writes name and kind on each parameter before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def check_patterns(
    names: Iterable[str], key: str, patterns: Iterable[str], unprojectable: Mapping[str, str] | None = None
) -> None:
    """Refuse a pattern that matches no parameter, or only parameters of which none can be projected.

    Args:
        names: of all parameters that a pattern may match.
        key: the option that the patterns come from, for the message.
        patterns: globs.
        unprojectable: why, for every name of a parameter that no option lets be projected; None to accept these.

    Raises:
        ConfigError: a pattern has no effect; the message has the pattern and some of the names.
    """
    known, reasons = list(names), unprojectable or {}
    for pattern in patterns:
        matched = [name for name in known if matches(name, pattern)]
        if not matched:
            raise ConfigError(
                f"{key}: {pattern!r} matches no parameter. Patterns are globs on the parameter's name, its module's "
                f"name or one component of it, for example '*_proj'. Names in this model: {', '.join(known[:6])}, ..."
            )
        if all(name in reasons for name in matched):
            found = ", ".join(f"{name} ({reasons[name]})" for name in matched[:3])
            raise ConfigError(
                f"{key}: {pattern!r} matches only parameters that are never projected: {found}; {len(matched)} in all. "
                "Name matrices, or remove the pattern"
            )


def nothing_projected(method: str, roles: Iterable[tuple[str, Role]], frozen: int) -> str | None:
    """Say that the method has nothing to do, and why; None if it has.

    Args:
        method: its name.
        roles: the name and role of every parameter that is trained, on all stages of a pipeline.
        frozen: how many matrices would be projected if they were not frozen.
    """
    found: dict[str, list[str]] = {}
    for name, role in roles:
        if role.projected:
            return None
        found.setdefault(role.reason, []).append(name)
    trained = "; ".join(f"{len(names)} x {reason} ({', '.join(names[:2])})" for reason, names in found.items())
    advice = f"unfreeze some of the {frozen} frozen matrices" if frozen else "pass the matrices of the layers too"
    return (
        f"{method} has nothing to project, AdamW would train everything: {trained or 'no parameter is trained'}. Use "
        f"AdamW, {advice}, or name some of these in target_modules"
    )
