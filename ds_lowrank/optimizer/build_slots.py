"""From parameters to slots: what role each has, which part of it is on this rank, and the state that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.distributed import ProcessGroup, get_rank

from ds_lowrank.methods.base import Method
from ds_lowrank.optimizer.logical_parameters import LogicalParameter
from ds_lowrank.optimizer.matrices import Matrices, output_first
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.zero import Interval, Placement, read_intervals
from ds_lowrank.sharding.layout import EMPTY, Part, Range
from ds_lowrank.sharding.logical import Logical


def build_slots(
    method: type[Method],
    parameters: Sequence[LogicalParameter],
    placement: Placement,
    grid: Grid,
    group: ProcessGroup | None,
    first_number: int = 0,
) -> list[Slot]:
    """A slot with fresh state for every logical matrix or vector. Collective over ``group``.

    Args:
        method: what steps the matrices.
        parameters: all that the optimizer was built with, in the order of the placement.
        placement: where DeepSpeed put the elements.
        grid: tensor and pipeline parallelism.
        group: the ranks that share the matrices; None for this rank alone.
        first_number: identifies the first matrix among those that are stepped together.
    """
    rank = 0 if group is None else get_rank(group)
    intervals = [interval for found in placement.intervals for interval in found]
    tensor_ranks, world = read_intervals(intervals, grid.tensor_rank, group)
    return slots_of(method, parameters, intervals, rank, tensor_ranks, world, first_number)


def slots_of(
    method: type[Method],
    parameters: Sequence[LogicalParameter],
    intervals: Sequence[Interval],
    rank: int,
    tensor_ranks: list[int],
    world: Sequence[Sequence[Range]],
    first_number: int = 0,
) -> list[Slot]:
    """The slots of one rank, from what every rank of its group holds.

    Args:
        method: what steps the matrices.
        parameters: all that the optimizer was built with.
        intervals: what this rank holds, one for each parameter that is not a part of another.
        rank: this rank's position in the group.
        tensor_ranks: the tensor-parallel rank of each rank of the group.
        world: for each rank of the group, the ``(start, end)`` that it holds of each parameter.
        first_number: identifies the first matrix among those that are stepped together.
    """
    numbers = {key: number for number, key in enumerate(dict.fromkeys(id(one.parameter) for one in parameters))}
    matrices, slots = Matrices(method, rank, first_number), list[Slot]()
    for parameter in parameters:
        number = numbers[id(parameter.parameter)]
        role = parameter.role(method)
        logical = parameter.stepped_matrix(role)
        parts, peers = _parts(logical, tensor_ranks, [held[number] for held in world])
        if not role.projected and parameter.options.reduction == "projected":
            parts, peers = _own_copy(parts, peers, rank, tensor_ranks)
        options, transposed = parameter.options, parameter.tag.transposed
        fragment, group_key = intervals[number].fragment(logical), id(parameter.group)
        text = ""
        if role.projected:
            shape = logical.shape[0], logical.shape[1]
            matrix = matrices.projected(logical.name, shape, parts, options, fragment, group_key, peers, transposed)
            text = method.rank_text(output_first(shape, transposed), options)
        else:
            matrix = matrices.elementwise(logical.name, parts, options, fragment, group_key, peers)
        matrix.state = parameter.state
        slots.append(
            Slot(
                tag=replace(parameter.tag, name=logical.name),
                role=role,
                shape=parameter.logical.shape,
                group=parameter.group,
                matrix=matrix,
                rank_text=text,
                parameter=parameter.parameter,
                logical=logical,
                whole=parameter.logical,
            )
        )
    matrices.make_states()
    return slots


def _parts(logical: Logical, tensor_ranks: list[int], held: list[Range]) -> tuple[list[Part], list[int]]:
    """What every rank holds of a matrix, and which ranks share this copy of it."""
    peers = [r for r, t in enumerate(tensor_ranks) if logical.placement == "sharded" or t == logical.own]
    sharing = set(peers)
    found: list[Part] = [
        logical.part(t, *held[r]) if r in sharing and held[r][0] < held[r][1] else EMPTY
        for r, t in enumerate(tensor_ranks)
    ]
    return found, peers


def _own_copy(parts: list[Part], peers: list[int], rank: int, tensor_ranks: list[int]) -> tuple[list[Part], list[int]]:
    """What remains without the copies of a parameter on other data-parallel ranks, which step theirs alike.

    Of the ranks with the same tensor-parallel rank, each is in another copy, in order.
    """
    copy = [tensor_ranks[:r].count(t) for r, t in enumerate(tensor_ranks)]
    own = [r for r in peers if copy[r] == copy[rank]]
    return [part if r in own else EMPTY for r, part in enumerate(parts)], own
