"""Checks of what all parameter groups together ask for: patterns that have an effect, and something to project.

With several ranks they wait until the grid is known, because what one stage of a pipeline lacks may be on another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from ds_lowrank.collectives import all_gather_object
from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method
from ds_lowrank.optimizer.logical_parameters import LogicalParameter
from ds_lowrank.optimizer.roles import Role, check_patterns, nothing_projected

logger = logging.getLogger("ds_lowrank")

TARGETS = "target_modules"
PATTERNS = (TARGETS, "exclude_modules")

Roles = list[tuple[str, Role]]
"""Names of parameters and their roles."""


@dataclass
class RoleChecks:
    """What is known of the roles of one optimizer's parameters.

    Attributes:
        method: of the optimizer.
        names: of all parameters, and of the matrices in them; the keys of a dict, in order.
        unprojectable: why, for every name of a parameter that no option lets be projected.
        patterns: those that wait: the names that they may match, the option they come from, the glob.
    """

    method: type[Method]
    names: dict[str, None] = field(default_factory=dict)
    unprojectable: dict[str, str] = field(default_factory=dict)
    patterns: list[tuple[list[str], str, str]] = field(default_factory=list)

    def add_names(self, names: Sequence[str]) -> None:
        """Note the names of a parameter and of the matrices in it.

        Args:
            names: all different.

        Raises:
            ConfigError: another parameter has one of them.
        """
        if twice := next((name for name in names if name in self.names), None):
            raise ConfigError(f"{twice}: given twice. State and seeds belong to a name: give each parameter its own")
        self.names |= dict.fromkeys(names)

    def add(self, parameters: Iterable[LogicalParameter]) -> None:
        """Note which of some trained parameters are no matrices.

        Args:
            parameters: the logical matrices and vectors.
        """
        for one in parameters:
            if len(one.logical.shape) != 2:
                self.unprojectable[one.tag.name] = one.role(self.method).reason

    def check_patterns(self, names: Sequence[str], options: Mapping[str, Any]) -> None:
        """Check that every pattern has an effect; with several ranks, leave that to :meth:`check_all`.

        Args:
            names: those that the patterns may match.
            options: the patterns by option; others are ignored.

        Raises:
            ConfigError: a pattern matches no parameter, or is a target that matches only what is never projected.
        """
        for key in PATTERNS:
            for pattern in options.get(key) or ():
                if _several_ranks():
                    self.patterns.append((list(names), key, pattern))
                else:
                    check_patterns(names, key, [pattern], self.unprojectable if key == TARGETS else None)

    def check_projected(self, roles: Callable[[], Roles]) -> None:
        """Check that something can be projected; with several ranks, leave that to :meth:`check_all`.

        Args:
            roles: returns those of all parameters, the frozen ones too.

        Raises:
            ConfigError: nothing can be projected.
        """
        if not _several_ranks() and (problem := nothing_projected(self.method.name, roles(), 0)):
            raise ConfigError(problem)

    def check_all(
        self, trained: Roles, frozen: Callable[[], Roles], pipeline: dist.ProcessGroup | None, may_unfreeze: bool
    ) -> None:
        """Check what could not be checked before the grid was known. Collective over the pipeline.

        Args:
            trained: the roles of everything that is trained on this stage.
            frozen: returns the roles that frozen parameters would have.
            pipeline: the pipeline's process group; None without a pipeline.
            may_unfreeze: whether frozen parameters may be trained later; then it is enough if some of these are
                matrices, and a warning is logged.

        Raises:
            ConfigError: a pattern has no effect, or nothing is projected.
        """
        stages = _gathered((self.names, self.unprojectable, trained), pipeline)
        unprojectable = {name: reason for _, reasons, _ in stages for name, reason in reasons.items()}
        everywhere = [name for names, *_ in stages for name in names]
        for names, key, pattern in self.patterns:
            known = names if pipeline is None else everywhere
            check_patterns(known, key, [pattern], unprojectable if key == TARGETS else None)
        roles = [role for *_, found in stages for role in found]
        if nothing_projected(self.method.name, roles, 0) is None:
            return
        matrices = sum(role.projected for found in _gathered(frozen(), pipeline) for _, role in found)
        problem = nothing_projected(self.method.name, roles, matrices)
        if not (may_unfreeze and matrices):
            raise ConfigError(problem)
        logger.warning("%s", problem)


def _gathered(value: Any, pipeline: dist.ProcessGroup | None) -> list[Any]:
    return [value] if pipeline is None else all_gather_object(value, pipeline)


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
