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

from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method, Options
from ds_lowrank.methods.blocks.ascent import Ascent
from ds_lowrank.optimizer.check_roles import PATTERNS, RoleChecks, Roles
from ds_lowrank.optimizer.logical_parameters import (
    LogicalParameter,
    check_shapes,
    logical_parameters_of,
    matchable_names,
)
from ds_lowrank.optimizer.options import parse_options
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.marks import refuse_foreign_sharding, refuse_uninitialized
from ds_lowrank.placement.parameter_names import Tag, tag_of, tag_of_own_tensor
from ds_lowrank.placement.tensor_parallel import refuse_empty_shards
from ds_lowrank.placement.zero import unpartitioned_shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
        self._checks = RoleChecks(method)
        self._validated: dict[int, tuple[dict[str, Any], Options]] = {}
        self._given_groups: list[tuple[dict[str, Any], list[torch.nn.Parameter]]] = []
        self._taken: set[torch.nn.Parameter] = set()
        self._left_out: list[torch.nn.Parameter] = []
        self.param_groups: list[dict[str, Any]] = []
        self.parameters: list[list[torch.nn.Parameter]] = []

    def validated(self, group: dict[str, Any]) -> tuple[dict[str, Any], Options, list[torch.nn.Parameter]]:
        """Validate a group's options, and select the parameters that have something to train.

        Args:
            group: as the caller gave it, with ``params``.

        Returns:
            A new group with all options and the selected parameters, the options, and the parameters that are frozen
            or selected.

        Raises:
            ConfigError: an option is wrong, a parameter has no name or a dtype that is not trained, or a matrix does
                not fit the method.
        """
        named = self._named(group["params"])
        tags = [self._checked_tag(name, parameter) for name, parameter in named]
        for (_, parameter), tag in zip(named, tags, strict=True):
            refuse_empty_shards(parameter, tag.name)
            refuse_foreign_sharding(parameter, tag.name)
        self._tags |= {parameter: tag for (_, parameter), tag in zip(named, tags, strict=True)}
        # Behind the parameters: DeepSpeed gives a group of experts, which are refused, a key of its own.
        given = {key: value for key, value in group.items() if key not in UNVALIDATED_GROUP_KEYS}
        options = parse_options(self._method, {**self._given, **given})
        present = [p for _, p in named if 0 not in unpartitioned_shape(p)]
        trained = [p for p in present if p.requires_grad]
        self._check_trained(trained, group, options)
        names = [name for (_, p), tag in zip(named, tags, strict=True) for name in matchable_names(p, tag)]
        self._checks.check_patterns(names, given)
        return {**group, **{key: getattr(options, key) for key in self._keys}, "params": trained}, options, present

    def _named(self, params: Any) -> list[tuple[str | None, torch.nn.Parameter]]:
        if isinstance(params, torch.nn.Module):
            raise ConfigError(
                "params of a group is a module: call ds_lowrank.tag_parameters on the whole model, and pass "
                "list(module.parameters())"
            )
        entries = [params] if isinstance(params, torch.Tensor) else list(params)
        return [entry if isinstance(entry, tuple) else (None, entry) for entry in entries]

    def _check_trained(self, trained: list[torch.nn.Parameter], group: dict[str, Any], options: Options) -> None:
        """Refuse dtypes and shapes that cannot be trained; note which parameters no option lets be projected."""
        for parameter in trained:
            if parameter.dtype not in DTYPES:
                name, dtype = self._tags[parameter].name, parameter.dtype
                raise ConfigError(f"{name} is {dtype}; the arithmetic is fp32: use fp32, bf16 or fp16")
        grid = self._grid_of(trained)
        found = [one for p in trained for one in logical_parameters_of(p, self._tags[p], group, options, {}, grid)]
        check_shapes(self._method, found)
        self._checks.add(found)

    def add(self, group: dict[str, Any], options: Options, present: list[torch.nn.Parameter]) -> None:
        """Record a validated group.

        Args:
            group: the optimizer's dict.
            options: its validated options.
            present: the parameters that the group may train, now or once they are no longer frozen.
        """
        self._given_groups.append((group, present))
        self._validated[id(group)] = {key: group[key] for key in self._keys}, options
        self._taken |= set(group["params"])
        self._select()

    def _select(self) -> None:
        """Update what is trained; a group with nothing to train is left out."""
        trained = [(group, [p for p in present if p in self._taken]) for group, present in self._given_groups]
        self.param_groups = [group for group, own in trained if own]
        self.parameters = [own for _, own in trained if own]
        self._left_out = [p for _, present in self._given_groups for p in present if p not in self._taken]

    def left_out(self) -> list[torch.nn.Parameter]:
        """The parameters that were frozen when their group was validated, and have not been taken since."""
        return list(self._left_out)

    def take_unfrozen(self) -> list[torch.nn.Parameter]:
        """Take up the parameters that are no longer frozen, each at its place in its group. The groups must be plain.

        Returns:
            What was taken up.

        Raises:
            ConfigError: a parameter has a dtype that is not trained, or does not fit the method.
        """
        found = [p for p in self.left_out() if p.requires_grad]
        if not found:
            return []
        late = set(found)
        for group, present in self._given_groups:
            own = [p for p in present if p in late]
            self._check_trained(own, group, self.options_of(group))
        self._taken |= late
        for group, present in self._given_groups:
            group["params"][:] = [p for p in present if p in self._taken]
        self._select()
        return found

    def name_of(self, parameter: torch.nn.Parameter) -> str:
        """The name of a parameter that was given.

        Args:
            parameter: of a group.
        """
        return self._tags[parameter].name

    def _checked_tag(self, name: str | None, parameter: torch.nn.Parameter) -> Tag:
        tag = tag_of(parameter)
        refuse_uninitialized(parameter, name or "a parameter")
        if tag is None and name is not None:
            tag = tag_of_own_tensor(name, parameter)
        if tag is None:
            raise ConfigError(
                f"{self._method.name} got {name or 'a parameter'} without its model, and neither name nor shape tells "
                "an embedding or a head from a weight. Pass the model itself, or call ds_lowrank.tag_parameters(model) "
                "first"
            )
        self._checks.add_names(matchable_names(parameter, tag))
        return tag

    def check(self, options: Options) -> None:
        """Check what only all groups together can tell.

        Args:
            options: those that the optimizer was built with.

        Raises:
            ConfigError: the model lacks something that the method needs, a pattern has no effect, or nothing can be
                projected.
        """
        if problem := self._method.missing_requirement(self._checks.names, options):
            raise ConfigError(f"{self._method.name}: {problem}")
        self._checks.check_patterns(list(self._checks.names), {key: getattr(options, key) for key in PATTERNS})
        self._checks.check_projected(lambda: [*self._roles(), *self._roles(frozen=True)])

    def check_roles(self, pipeline: dist.ProcessGroup | None, may_unfreeze: bool) -> None:
        """Check what could not be checked before the grid was known. Collective over the pipeline.

        Args:
            pipeline: the pipeline's process group; None without a pipeline.
            may_unfreeze: whether parameters that are frozen now may be trained later.

        Raises:
            ConfigError: a pattern has no effect, or nothing is projected.
        """
        self._checks.check_all(self._roles(), lambda: self._roles(frozen=True), pipeline, may_unfreeze)

    def _roles(self, frozen: bool = False) -> Roles:
        """The name and role of everything that is trained, or of what is frozen."""
        grid = self.grid
        return [
            (one.tag.name, one.role(self._method))
            for group, present in self._given_groups
            for p in present
            if (p not in self._taken) == frozen
            for one in logical_parameters_of(p, self._tags[p], group, self.options_of(group), {}, grid)
        ]

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
    def reduces_projections(self) -> bool:
        """Whether projections of gradients are summed over data-parallel ranks, and not the gradients.

        Raises:
            ConfigError: the groups disagree, or the method needs the gradients.
        """
        chosen = {options.reduction for options in self.options.values()}
        if len(chosen) > 1:
            raise ConfigError("reduction must be the same in all parameter groups")
        if chosen != {"projected"}:
            return False
        for options in self.options.values():
            if problem := self._method.needs_gradient(options):
                raise ConfigError(f"{self._method.name} with reduction 'projected': {problem}")
        return True

    @property
    def projected_gradient_clipping(self) -> float:
        """The largest norm under projected reduction; 0 for no clipping.

        Raises:
            ConfigError: the groups disagree.
        """
        chosen = {options.projected_gradient_clipping for options in self.options.values()}
        if len(chosen) > 1:
            raise ConfigError("projected_gradient_clipping must be the same in all parameter groups: it is of one norm")
        return next(iter(chosen), 0.0)

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
