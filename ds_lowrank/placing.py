"""From parameters to slots: what role each has, which part of it is here, and the state that belongs to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_lowrank.errors import ConfigError
from ds_lowrank.methods.base import Method, Options
from ds_lowrank.methods.full_size import full_size_state
from ds_lowrank.methods.keep import Keep, State
from ds_lowrank.roles import Role, Tag, role_of
from ds_lowrank.sharding.layout import Part
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.zero import Placement, logical_shape, read_parts
from ds_lowrank.slots import Slot


@dataclass(frozen=True)
class Member:
    """A parameter that the optimizer was built with.

    Attributes:
        options: of its group.
        state: an empty dict, to be filled.
    """

    parameter: torch.nn.Parameter
    tag: Tag
    group: dict[str, Any]
    options: Options
    state: State

    @property
    def shape(self) -> tuple[int, ...]:
        return logical_shape(self.parameter)

    def role(self, method: type[Method]) -> Role:
        choice = method.chooses(self.tag.name, self.options) if len(self.shape) == 2 else None
        if choice is not None:
            return Role(*choice)
        return role_of(self.tag, self.shape, self.options.target_modules, self.options.exclude_modules)


def check_fit(method: type[Method], members: Iterable[Member]) -> None:
    """Refuse matrices that the method cannot step.

    Raises:
        ConfigError: says for every such shape why, what would work, and which matrices these are.
    """
    misfits: dict[str, list[str]] = {}
    for member in (member for member in members if member.role(method).projected):
        m, n = member.shape
        problem = method.misfit((m, n), member.options)
        if problem is not None:
            misfits.setdefault(f"{m} x {n}: {problem}", []).append(member.tag.name)
    if misfits:
        lines = [f"  {problem} ({', '.join(names[:2])}; {len(names)} in all)" for problem, names in misfits.items()]
        advice = "Change the option, give some of them a parameter group of their own, or put them in exclude_modules."
        raise ConfigError("\n".join([f"{method.name} cannot step these matrices:", *lines, advice]))


def make_slots(method: type[Method], members: Sequence[Member], placement: Placement, rank: int) -> list[Slot]:
    """A slot with fresh state for every member; the ranks that hold a matrix take turns in factoring.

    Args:
        placement: where DeepSpeed put the elements.
        rank: this rank's position among those that share the matrices.
    """
    fragments = [fragment for found in placement.fragments for fragment in found]
    parts = read_parts([member.shape for member in members], fragments, placement.process_group)
    slots: list[Slot] = []
    matrices = 0
    for member, fragment, held in zip(members, fragments, parts, strict=True):
        role = member.role(method)
        if role.projected:
            shard, keep, rank_text = _projected(method, member, held, rank, matrices)
            matrices += 1
        else:
            shard, keep, rank_text = *_elementwise(member, held, rank), ""
        member.state.update({"step": 0, **keep.empty(fragment.store.device)})
        slots.append(
            Slot(
                member.tag,
                role,
                member.shape,
                member.group,
                fragment,
                shard,
                keep,
                rank_text,
                member.state,
                member.parameter,
            )
        )
    return slots


def _projected(
    method: type[Method], member: Member, parts: list[Part], rank: int, index: int
) -> tuple[MatrixShard, Keep, str]:
    shape, options = (member.shape[0], member.shape[1]), member.options
    holders = [rank for rank, part in enumerate(parts) if part.numel]
    side, factor_rank = method.side(shape, options), holders[index % len(holders)]
    shard = MatrixShard(member.tag.name, shape, parts, rank, side, factor_rank, options.run)
    keep = Keep(member.tag.name, lambda at: method.state(shard, options, at), method.rank(shape, options))
    return shard, keep, method.rank_text(shape, options)


def _elementwise(member: Member, parts: list[Part], rank: int) -> tuple[MatrixShard, Keep]:
    """A parameter of any shape as one row; the side does not matter, as nothing is compressed."""
    numel = parts[0].block.numel
    shard = MatrixShard(member.tag.name, (1, numel), parts, rank, "right", 0, member.options.run)
    return shard, Keep(member.tag.name, lambda _: full_size_state(shard, member.options), 0)
