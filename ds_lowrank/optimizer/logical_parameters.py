"""The logical matrices and vectors in an optimizer's parameters, and how each is stepped.

A parameter is one of them or, if it is a fused weight, several.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method, Options, State
from ds_lowrank.optimizer.matrices import output_first
from ds_lowrank.optimizer.roles import Role, role_of
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.marks import is_tied_between_stages
from ds_lowrank.placement.parameter_names import Tag
from ds_lowrank.placement.tensor_parallel import logical_matrices, piece_names
from ds_lowrank.placement.zero import unpartitioned_shape
from ds_lowrank.sharding.logical import Logical


@dataclass(frozen=True)
class LogicalParameter:
    """A logical matrix or vector that the optimizer was built with.

    Attributes:
        parameter: the parameter it is in.
        logical: where in the parameter its elements are.
        tag: its name and kind.
        group: its parameter group.
        options: of the group.
        state: an empty dict, to be filled.
    """

    parameter: torch.nn.Parameter
    logical: Logical
    tag: Tag
    group: dict[str, Any]
    options: Options
    state: State

    def role(self, method: type[Method]) -> Role:
        """Decide whether the parameter is projected: the method may decide, otherwise its name and shape do.

        Args:
            method: the optimizer's.
        """
        shape = self.logical.shape
        override = method.role_override(self.tag.name, self.options) if len(shape) == 2 else None
        if override is not None:
            return Role(*override)
        return role_of(self.tag, shape, self.options.target_modules, self.options.exclude_modules)

    def stepped_matrix(self, role: Role) -> Logical:
        """The matrix that a step works on.

        Args:
            role: of this parameter.

        Returns:
            If it is projected the logical matrix or, with local projection, this rank's shard as its own matrix;
            otherwise all elements as one row.
        """
        if not role.projected:
            return self.logical.as_row()
        return self.logical.as_local() if self.options.tensor_parallel_projection == "local" else self.logical


def matchable_names(parameter: torch.nn.Parameter, tag: Tag) -> list[str]:
    """The names that patterns may match: the parameter's, and those of the matrices fused in it.

    Args:
        parameter: of the model, on this tensor-parallel rank.
        tag: its name and kind.
    """
    return list(dict.fromkeys([tag.name, *piece_names(parameter, unpartitioned_shape(parameter), tag.name)]))


def logical_parameters_of(
    parameter: torch.nn.Parameter, tag: Tag, group: dict[str, Any], options: Options, state: State, grid: Grid
) -> list[LogicalParameter]:
    """Every logical matrix or vector in a parameter; with local projection, none that is on another tensor rank.

    Args:
        parameter: of the model, on this tensor-parallel rank.
        tag: its name and kind.
        group: its parameter group.
        options: of the group.
        state: the parameter's, an empty dict; each matrix of a fused weight gets a dict of its own in it.
        grid: tensor and pipeline parallelism.
    """
    found = logical_matrices(parameter, unpartitioned_shape(parameter), tag.name, grid)
    if options.tensor_parallel_projection == "local":
        found = [logical for logical in found if logical.owner in (None, logical.own)]
    return [
        LogicalParameter(
            parameter=parameter,
            logical=logical,
            tag=tag if logical.piece is None else replace(tag, name=logical.name, within=tag.name),
            group=group,
            options=options,
            state=state if logical.piece is None else state.setdefault(logical.piece, {}),
        )
        for logical in found
    ]


def check_shapes(method: type[Method], parameters: Iterable[LogicalParameter]) -> None:
    """Refuse matrices that the method cannot step.

    Args:
        method: the optimizer's.
        parameters: all logical matrices and vectors.

    Raises:
        ConfigError: the method cannot step a matrix; the message says for every such shape why, what would work, and
            which matrices have it.
    """
    refused: dict[str, list[str]] = {}
    for parameter in parameters:
        role = parameter.role(method)
        if not role.projected:
            continue
        m, n = parameter.stepped_matrix(role).shape
        problem = method.unsupported_shape(output_first((m, n), parameter.tag.transposed), parameter.options)
        if is_tied_between_stages(parameter.parameter):
            problem = "a weight that stages of a pipeline share is not projected, as its copies would drift apart"
        if problem is not None:
            refused.setdefault(f"{m} x {n}: {problem}", []).append(parameter.tag.name)
    if refused:
        lines = [f"  {problem} ({', '.join(names[:2])}; {len(names)} in all)" for problem, names in refused.items()]
        advice = "Change the option, give some of them a parameter group of their own, or put them in exclude_modules."
        raise ConfigError("\n".join([f"{method.name} cannot step these matrices:", *lines, advice]))
