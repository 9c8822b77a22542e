from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.state_spec import State
from ds_lowrank.optimizer.roles import Role, role_of
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.parameter_names import Tag
from ds_lowrank.placement.tensor_parallel import logical_matrices, piece_names
from ds_lowrank.placement.zero import unpartitioned_shape
from ds_lowrank.sharding.logical import Logical


@dataclass(frozen=True)
class LogicalParameter:
    """A logical matrix (or vector) that the optimizer was built with: a parameter, or one of the matrices fused in it.

    Attributes:
        options: of its group.
        state: an empty dict, to be filled.
    """

    parameter: torch.nn.Parameter
    logical: Logical
    tag: Tag
    group: dict[str, Any]
    options: Options
    state: State

    def role(self, method: type[Method]) -> Role:
        shape = self.logical.shape
        choice = method.role_override(self.tag.name, self.options) if len(shape) == 2 else None
        if choice is not None:
            return Role(*choice)
        return role_of(self.tag, shape, self.options.target_modules, self.options.exclude_modules)

    def stepped_matrix(self, role: Role) -> Logical:
        """The matrix that is stepped: the logical one, or this rank's shard as one of its own."""
        if not role.projected:
            return self.logical.as_row()
        return self.logical.as_local() if self.options.tensor_parallel_projection == "local" else self.logical


def matchable_names(parameter: torch.nn.Parameter, tag: Tag) -> list[str]:
    """What patterns may match: the parameter's name, and those of the matrices fused in it."""
    return list(dict.fromkeys([tag.name, *piece_names(parameter, unpartitioned_shape(parameter), tag.name)]))


def logical_parameters_of(
    parameter: torch.nn.Parameter, tag: Tag, group: dict[str, Any], options: Options, state: State, grid: Grid
) -> list[LogicalParameter]:
    """One for every logical matrix in a parameter; those of a fused weight have a state each in the parameter's."""
    found = logical_matrices(parameter, unpartitioned_shape(parameter), tag.name, grid)
    return [
        LogicalParameter(
            *(parameter, logical, _tag_in(tag, logical), group, options),
            state if logical.piece is None else state.setdefault(logical.piece, {}),
        )
        for logical in found
    ]


def _tag_in(tag: Tag, logical: Logical) -> Tag:
    return tag if logical.piece is None else replace(tag, name=logical.name, within=tag.name)


def check_fit(method: type[Method], members: Iterable[LogicalParameter]) -> None:
    """Refuse matrices that the method cannot step.

    Raises:
        ConfigError: says for every such shape why, what would work, and which matrices these are.
    """
    misfits: dict[str, list[str]] = {}
    for member in members:
        role = member.role(method)
        if not role.projected:
            continue
        m, n = member.stepped_matrix(role).shape
        problem = method.unsupported_shape((m, n), member.options)
        if getattr(member.parameter, "ds_pipe_replicated", False):
            problem = "a weight that stages of a pipeline share is not projected, as its copies would drift apart"
        if problem is not None:
            misfits.setdefault(f"{m} x {n}: {problem}", []).append(member.tag.name)
    if misfits:
        lines = [f"  {problem} ({', '.join(names[:2])}; {len(names)} in all)" for problem, names in misfits.items()]
        advice = "Change the option, give some of them a parameter group of their own, or put them in exclude_modules."
        raise ConfigError("\n".join([f"{method.name} cannot step these matrices:", *lines, advice]))
