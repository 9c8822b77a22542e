"""From parameters to slots: what role each has, which part of it is on this rank, and the state that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.distributed import ProcessGroup, get_rank

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.full_rank_adam import full_rank_state
from ds_lowrank.methods.blocks.state_spec import StateStore
from ds_lowrank.optimizer.logical_parameters import LogicalParameter
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.step import output_first, shard_matrix
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.zero import Placement, read_intervals
from ds_lowrank.sharding.layout import EMPTY, Part, Range
from ds_lowrank.sharding.logical import Logical
from ds_lowrank.sharding.matrix import MatrixShard


def build_slots(
    method: type[Method],
    parameters: Sequence[LogicalParameter],
    placement: Placement,
    grid: Grid,
    group: ProcessGroup | None,
) -> list[Slot]:
    """A slot with fresh state for every logical matrix or vector. Collective over ``group``.

    Args:
        method: what steps the matrices.
        parameters: all that the optimizer was built with, in the order of the placement.
        placement: where DeepSpeed put the elements.
        grid: tensor and pipeline parallelism.
        group: the ranks that share the matrices; None for this rank alone.
    """
    rank = 0 if group is None else get_rank(group)
    intervals = [interval for found in placement.intervals for interval in found]
    tensor_ranks, world = read_intervals(intervals, grid.tensor_rank, group)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(id(one.parameter) for one in parameters))}
    slots: list[Slot] = []
    matrices = 0
    for parameter in parameters:
        number = numbers[id(parameter.parameter)]
        role = parameter.role(method)
        logical = parameter.stepped_matrix(role)
        parts, peers = _parts(logical, tensor_ranks, [held[number] for held in world])
        if role.projected:
            shape = logical.shape[0], logical.shape[1]
            options, transposed = parameter.options, parameter.tag.transposed
            shard, store = shard_matrix(
                method, logical.name, shape, parts, rank, options, matrices, peers, transposed=transposed
            )
            matrices += 1
        else:
            shard, store = _elementwise(parameter, logical, parts, peers, rank)
        fragment = intervals[number].fragment(logical)
        parameter.state.update({"step": 0, **store.empty(fragment.store.device)})
        slots.append(
            Slot(
                tag=replace(parameter.tag, name=logical.name),
                role=role,
                shape=parameter.logical.shape,
                group=parameter.group,
                fragment=fragment,
                shard=shard,
                state_store=store,
                rank_text=_rank_text(method, shard, parameter) if role.projected else "",
                state=parameter.state,
                parameter=parameter.parameter,
                logical=logical,
            )
        )
    return slots


def _rank_text(method: type[Method], shard: MatrixShard, parameter: LogicalParameter) -> str:
    return method.rank_text(output_first(shard.shape, shard.transposed), parameter.options)


def _parts(logical: Logical, tensor_ranks: list[int], held: list[Range]) -> tuple[list[Part], list[int]]:
    """What every rank holds of a matrix, and which ranks share this copy of it."""
    peers = [r for r, t in enumerate(tensor_ranks) if logical.placement == "sharded" or t == logical.own]
    sharing = set(peers)
    return [logical.part(t, *held[r]) if r in sharing else EMPTY for r, t in enumerate(tensor_ranks)], peers


def _elementwise(
    parameter: LogicalParameter, logical: Logical, parts: list[Part], peers: list[int], rank: int
) -> tuple[MatrixShard, StateStore]:
    """A parameter of any shape as one row. The side does not matter, as nothing is compressed."""
    shape, options = (1, sum(part.numel for part in parts)), parameter.options
    shard = MatrixShard(logical.name, shape, parts, rank, "right", 0, options.block_rows, peers)
    return shard, StateStore(logical.name, lambda _: full_rank_state(shard, options), 0)
