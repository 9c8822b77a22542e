"""From parameters to slots: what role each has, which part of it is here, and the state that belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed import ProcessGroup, get_rank

from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method, Options
from ds_lowrank.methods.full_size import full_size_state
from ds_lowrank.methods.keep import Keep, State
from ds_lowrank.roles import Role, Tag, role_of
from ds_lowrank.sharding.grid import Grid
from ds_lowrank.sharding.layout import NOTHING, Held, Range
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.tensor_parallel import Logical, logical_matrices, piece_names
from ds_lowrank.sharding.zero import Placement, read_intervals, shape_before_zero
from ds_lowrank.slots import Slot


@dataclass(frozen=True)
class Member:
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
        choice = method.chooses(self.tag.name, self.options) if len(shape) == 2 else None
        if choice is not None:
            return Role(*choice)
        return role_of(self.tag, shape, self.options.target_modules, self.options.exclude_modules)

    def placed(self, role: Role) -> Logical:
        """The matrix that is stepped: the logical one, or this rank's shard as one of its own."""
        if not role.projected:
            return self.logical.as_row()
        return self.logical.apart() if self.options.tensor_parallel_projection == "local" else self.logical


def names_in(parameter: torch.nn.Parameter, tag: Tag) -> list[str]:
    """What patterns may match: the parameter's name, and those of the matrices fused in it."""
    return list(dict.fromkeys([tag.name, *piece_names(parameter, shape_before_zero(parameter), tag.name)]))


def members_of(
    parameter: torch.nn.Parameter, tag: Tag, group: dict[str, Any], options: Options, state: State, grid: Grid
) -> list[Member]:
    """One for every logical matrix in a parameter; those of a fused weight have a state each in the parameter's."""
    found = logical_matrices(parameter, shape_before_zero(parameter), tag.name, grid)
    return [
        Member(
            *(parameter, logical, _tag_in(tag, logical), group, options),
            state if logical.piece is None else state.setdefault(logical.piece, {}),
        )
        for logical in found
    ]


def _tag_in(tag: Tag, logical: Logical) -> Tag:
    return tag if logical.piece is None else replace(tag, name=logical.name, within=tag.name)


def check_fit(method: type[Method], members: Iterable[Member]) -> None:
    """Refuse matrices that the method cannot step.

    Raises:
        ConfigError: says for every such shape why, what would work, and which matrices these are.
    """
    misfits: dict[str, list[str]] = {}
    for member in members:
        role = member.role(method)
        if not role.projected:
            continue
        m, n = member.placed(role).shape
        problem = method.misfit((m, n), member.options)
        if getattr(member.parameter, "ds_pipe_replicated", False):
            problem = "a weight that stages of a pipeline share is not projected, as its copies would drift apart"
        if problem is not None:
            misfits.setdefault(f"{m} x {n}: {problem}", []).append(member.tag.name)
    if misfits:
        lines = [f"  {problem} ({', '.join(names[:2])}; {len(names)} in all)" for problem, names in misfits.items()]
        advice = "Change the option, give some of them a parameter group of their own, or put them in exclude_modules."
        raise ConfigError("\n".join([f"{method.name} cannot step these matrices:", *lines, advice]))


def make_slots(
    method: type[Method], members: Sequence[Member], placement: Placement, grid: Grid, group: ProcessGroup | None
) -> list[Slot]:
    """A slot with fresh state for every member; the ranks that hold a matrix take turns in factoring.

    Args:
        placement: where DeepSpeed put the elements.
        group: the ranks that hold the matrices between them; None for this rank alone.
    """
    rank = 0 if group is None else get_rank(group)
    intervals = [interval for found in placement.intervals for interval in found]
    tensor_ranks, world = read_intervals(intervals, grid.tensor_rank, group)
    parameters = dict.fromkeys(id(member.parameter) for member in members)  # each once, in the intervals' order
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    slots: list[Slot] = []
    matrices = 0
    for member in members:
        number = numbers[id(member.parameter)]
        role = member.role(method)
        logical = member.placed(role)
        parts, peers = _parts(logical, tensor_ranks, [held[number] for held in world])
        if role.projected:
            shard, keep, rank_text = _projected(method, member, logical, parts, peers, rank, matrices)
            matrices += 1
        else:
            shard, keep, rank_text = *_elementwise(member, logical, parts, peers, rank), ""
        fragment = intervals[number].fragment(logical)
        member.state.update({"step": 0, **keep.empty(fragment.store.device)})
        slots.append(
            Slot(
                replace(member.tag, name=logical.name),
                *(role, member.logical.shape, member.group, fragment, shard, keep, rank_text, member.state),
                *(member.parameter, logical),
            )
        )
    return slots


def _parts(logical: Logical, tensor_ranks: list[int], held: list[Range]) -> tuple[list[Held], list[int]]:
    """What every rank holds of a matrix, and which ranks share this copy of it."""
    peers = [r for r, t in enumerate(tensor_ranks) if logical.held == "shared" or t == logical.own]
    sharing = set(peers)
    return [logical.part(t, *held[r]) if r in sharing else NOTHING for r, t in enumerate(tensor_ranks)], peers


def _projected(
    method: type[Method],
    member: Member,
    logical: Logical,
    parts: list[Held],
    peers: list[int],
    rank: int,
    index: int,
) -> tuple[MatrixShard, Keep, str]:
    shape, options = (logical.shape[0], logical.shape[1]), member.options
    holders = [rank for rank, part in enumerate(parts) if part.numel]
    side, factor_rank = method.side(shape, options), holders[index % len(holders)]
    shard = MatrixShard(logical.name, shape, parts, rank, side, factor_rank, options.run, peers)
    keep = Keep(logical.name, lambda at: method.state(shard, options, at), method.rank(shape, options))
    return shard, keep, method.rank_text(shape, options)


def _elementwise(
    member: Member, logical: Logical, parts: list[Held], peers: list[int], rank: int
) -> tuple[MatrixShard, Keep]:
    """A parameter of any shape as one row; the side does not matter, as nothing is compressed."""
    shape = (1, sum(part.numel for part in parts))
    shard = MatrixShard(logical.name, shape, parts, rank, "right", 0, member.options.run, peers)
    return shard, Keep(logical.name, lambda _: full_size_state(shard, member.options), 0)
