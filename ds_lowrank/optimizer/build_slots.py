"""From parameters to slots: what role each has, which part of it is here, and the state that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.distributed import ProcessGroup, get_rank

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.full_rank_adam import full_rank_state
from ds_lowrank.methods.blocks.state_spec import StateStore
from ds_lowrank.optimizer.logical_parameters import LogicalParameter
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.zero import Placement, read_intervals
from ds_lowrank.sharding.layout import EMPTY, Part, Range
from ds_lowrank.sharding.logical import Logical
from ds_lowrank.sharding.matrix import MatrixShard


def make_slots(
    method: type[Method],
    members: Sequence[LogicalParameter],
    placement: Placement,
    grid: Grid,
    group: ProcessGroup | None,
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
        logical = member.stepped_matrix(role)
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


def _parts(logical: Logical, tensor_ranks: list[int], held: list[Range]) -> tuple[list[Part], list[int]]:
    """What every rank holds of a matrix, and which ranks share this copy of it."""
    peers = [r for r, t in enumerate(tensor_ranks) if logical.placement == "sharded" or t == logical.own]
    sharing = set(peers)
    return [logical.part(t, *held[r]) if r in sharing else EMPTY for r, t in enumerate(tensor_ranks)], peers


def _projected(
    method: type[Method],
    member: LogicalParameter,
    logical: Logical,
    parts: list[Part],
    peers: list[int],
    rank: int,
    index: int,
) -> tuple[MatrixShard, StateStore, str]:
    shape, options = (logical.shape[0], logical.shape[1]), member.options
    holders = [rank for rank, part in enumerate(parts) if part.numel]
    side, root = method.side(shape, options), holders[index % len(holders)]
    shard = MatrixShard(logical.name, shape, parts, rank, side, root, options.block_rows, peers)
    keep = StateStore(logical.name, lambda at: method.state(shard, options, at), method.rank(shape, options))
    return shard, keep, method.rank_text(shape, options)


def _elementwise(
    member: LogicalParameter, logical: Logical, parts: list[Part], peers: list[int], rank: int
) -> tuple[MatrixShard, StateStore]:
    """A parameter of any shape as one row; the side does not matter, as nothing is compressed."""
    shape = (1, sum(part.numel for part in parts))
    shard = MatrixShard(logical.name, shape, parts, rank, "right", 0, member.options.block_rows, peers)
    return shard, StateStore(logical.name, lambda _: full_rank_state(shard, member.options), 0)
