"""The caller's parameter groups, with validated options and with the names of their parameters.

DeepSpeed replaces the parameters in an optimizer's groups, so the original ones are recorded here. A scheduler or a
user changes values in a group's dict; the validated options of each group are also recorded here, and rebuilt only if a
value has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ds_lowrank.collectives import all_gather_object
from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method, Options
from ds_lowrank.methods.blocks.ascent import Ascent
from ds_lowrank.optimizer.logical_parameters import (
    LogicalParameter,
    check_shapes,
    logical_parameters_of,
    matchable_names,
)
from ds_lowrank.optimizer.options import parse_options
from ds_lowrank.optimizer.roles import check_patterns
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.marks import refuse_foreign_sharding
from ds_lowrank.placement.parameter_names import Tag, tag_from_name, tag_of
from ds_lowrank.placement.tensor_parallel import refuse_empty_shards
from ds_lowrank.placement.zero import unpartitioned_shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("target_modules", "exclude_modules")
GridOf = Callable[[Iterable[torch.nn.Parameter]], Grid]
UNVALIDATED_GROUP_KEYS = frozenset({"params", "param_names", "name", "initial_lr"})


class ParameterGroups:
    """All parameter groups of one optimizer.

    Args:
        method: of the optimizer.
        given: the options it was built with, which a group may override.
        grid: returns the current grid of some parameters: AutoTP may create its groups after the optimizer.

    Attributes:
        param_groups: the optimizer's groups that have something to train.
        parameters: for each of them, the trainable parameters it was built with.
    """

    def __init__(self, method: type[Method], given: Mapping[str, Any], grid: GridOf) -> None:
        self._method, self._given, self._grid_of = method, given, grid
        self._keys = tuple(method.Options.model_fields)
        self._tags: dict[torch.Tensor, Tag] = {}
        self._names: list[str] = []
        self._patterns: list[tuple[list[str], str, str]] = []
        self._validated: dict[int, tuple[dict[str, Any], Options]] = {}
        self.param_groups: list[dict[str, Any]] = []
        self.parameters: list[list[torch.nn.Parameter]] = []

    def validated(self, group: dict[str, Any]) -> tuple[dict[str, Any], Options]:
        """Validate a group's options, and select the parameters that have something to train.

        Args:
            group: as the caller gave it, with ``params``.

        Returns:
            A new group with all options and the selected parameters, and the options.

        Raises:
            ConfigError: an option is wrong, a parameter has no name or a dtype that is not trained, or a matrix does
                not fit the method.
        """
        given = {key: value for key, value in group.items() if key not in UNVALIDATED_GROUP_KEYS}
        options = parse_options(self._method, {**self._given, **given})
        entries = group["params"]
        entries = [entries] if isinstance(entries, torch.Tensor) else list(entries)
        named = [entry if isinstance(entry, tuple) else (None, entry) for entry in entries]
        tags = [self._checked_tag(name, parameter) for name, parameter in named]
        names = [name for (_, p), tag in zip(named, tags, strict=True) for name in matchable_names(p, tag)]
        for key in PATTERNS:
            self._must_match(names, key, given.get(key) or ())
        for (_, parameter), tag in zip(named, tags, strict=True):
            refuse_empty_shards(parameter, tag.name)
            refuse_foreign_sharding(parameter, tag.name)
        self._tags |= {parameter: tag for (_, parameter), tag in zip(named, tags, strict=True)}
        trained = [p for _, p in named if p.requires_grad and 0 not in unpartitioned_shape(p)]
        for parameter in trained:
            if parameter.dtype not in DTYPES:
                name, dtype = self._tags[parameter].name, parameter.dtype
                raise ConfigError(f"{name} is {dtype}; the arithmetic is fp32: use fp32, bf16 or fp16")
        grid = self._grid_of(trained)
        found = [logical_parameters_of(p, self._tags[p], group, options, {}, grid) for p in trained]
        check_shapes(self._method, [one for of_parameter in found for one in of_parameter])
        return {**group, **{key: getattr(options, key) for key in self._keys}, "params": trained}, options

    def add(self, group: dict[str, Any], options: Options) -> None:
        """Record a validated group; one with nothing to train is ignored.

        Args:
            group: the optimizer's dict.
            options: its validated options.
        """
        if group["params"]:
            self.param_groups.append(group)
            self.parameters.append(list(group["params"]))
            self._validated[id(group)] = {key: group[key] for key in self._keys}, options

    def check(self, options: Options) -> None:
        """Check what only all groups together can tell.

        Args:
            options: those that the optimizer was built with.

        Raises:
            ConfigError: the model lacks something that the method needs, or a pattern matches no parameter.
        """
        if problem := self._method.missing_requirement(self._names, options):
            raise ConfigError(f"{self._method.name}: {problem}")
        for key in PATTERNS:
            self._must_match(self._names, key, getattr(options, key) or ())

    def _checked_tag(self, name: str | None, parameter: torch.nn.Parameter) -> Tag:
        tag = tag_of(parameter) or (tag_from_name(name) if name is not None else None)
        if tag is None:
            raise ConfigError(
                f"{self._method.name} got a parameter without a name, and a shape cannot tell an embedding from a "
                "weight. Pass model.named_parameters(), or call ds_lowrank.tag_parameters(model) first."
            )
        names = matchable_names(parameter, tag)
        if twice := next((name for name in names if name in self._names), None):
            raise ConfigError(f"{twice}: given twice. State and seeds belong to a name: give each parameter its own")
        self._names += names
        return tag

    def _must_match(self, names: Iterable[str], key: str, patterns: Iterable[str]) -> None:
        """Check that every pattern matches a parameter; with several ranks, leave that to ``match_patterns``."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._patterns += [(list(names), key, pattern) for pattern in patterns]
        else:
            check_patterns(names, key, patterns)

    def match_patterns(self, pipeline: dist.ProcessGroup | None) -> None:
        """Check the patterns that could not be checked before the grid was known. Collective over the pipeline.

        Args:
            pipeline: the pipeline's process group: a pattern may match on any stage. None without a pipeline.

        Raises:
            ConfigError: a pattern matches no parameter.
        """
        if pipeline is None:
            for own, key, pattern in self._patterns:
                check_patterns(own, key, [pattern])
            return
        names = [name for stage in all_gather_object(self._names, pipeline) for name in stage]
        for _, key, pattern in self._patterns:
            check_patterns(names, key, [pattern])

    def options_of(self, group: dict[str, Any]) -> Options:
        """The validated options of a group, with the current values of its dict.

        Args:
            group: the optimizer's dict.

        Raises:
            ConfigError: a value that was changed since the last call is not valid.
        """
        values, options = self._validated[id(group)]
        changed = {key: group[key] for key in self._keys if group[key] != values[key]}
        if not changed:
            return options
        lr = changed.get("lr")
        if changed.keys() == {"lr"} and isinstance(lr, float) and 0 <= lr < math.inf:  # what a scheduler does
            options = options.model_copy(update=changed)
        else:
            options = parse_options(self._method, {**values, **changed})
        self._validated[id(group)] = {**values, **changed}, options
        return options

    @property
    def options(self) -> dict[int, Options]:
        """The validated options of every parameter group, by the group's ``id``."""
        return {id(group): self.options_of(group) for group in self.param_groups}

    @property
    def grid(self) -> Grid:
        """The current grid of all parameters."""
        return self._grid_of(parameter for own in self.parameters for parameter in own)

    @property
    def project_locally(self) -> bool:
        """Whether tensor-parallel ranks project their own shards.

        Raises:
            ConfigError: the groups disagree.
        """
        chosen = {options.tensor_parallel_projection for options in self.options.values()}
        if len(chosen) > 1:
            raise ConfigError("tensor_parallel_projection must be the same in all parameter groups")
        return "local" in chosen

    @property
    def ascent(self) -> Ascent | None:
        """How higher loss is looked for; None if it is not. All groups' matrices are moved together.

        Raises:
            ConfigError: the groups disagree.
        """
        ascents = {options.ascent for options in self.options.values()}
        if len(ascents) > 1:
            raise ConfigError(
                f"{self._method.name}: all parameter groups are perturbed together, and must agree on probes, "
                "probe_radius, perturbation_radius, two_sided, norm and accumulation"
            )
        return next(iter(ascents), None)

    def logical_parameters(self, state: Mapping[torch.Tensor, Any]) -> list[LogicalParameter]:
        """Every logical matrix or vector of every group, in order.

        Args:
            state: the optimizer's: an empty dict for each parameter.

        Raises:
            ConfigError: a parameter was given to FSDP after the optimizer was built.
        """
        for parameter in (parameter for own in self.parameters for parameter in own):
            refuse_foreign_sharding(parameter, self._tags[parameter].name)
        grid = self.grid
        return [
            one
            for own, group, options in zip(self.parameters, self.param_groups, self.options.values(), strict=True)
            for parameter in own
            for one in logical_parameters_of(parameter, self._tags[parameter], group, options, state[parameter], grid)
        ]
