"""The role table, which shows every parameter, how it is trained, and the memory of the optimizer's state."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_lowrank.collectives import all_gather_object, global_rank
from ds_lowrank.environment.apex import adamw_by
from ds_lowrank.methods.blocks.state_spec import BASIS_KEYS
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.marks import is_tied_between_stages
from ds_lowrank.sharding.layout import length
from ds_lowrank.sharding.reduce import Distributed, Executor

logger = logging.getLogger("ds_lowrank")


@dataclass(frozen=True)
class Row:
    """One row of the role table: the parameters that differ only in the numbers in their names.

    Attributes:
        name: their name, with ``*`` for each number.
        role: how they are trained and, unless they are projected, why; and how they are replicated.
        shape: the logical shape.
        side: the side that is compressed, or '' if they are not projected.
        rank: the rank as text, or '' if they are not projected.
    """

    name: str
    role: str
    shape: str
    side: str
    rank: str


@dataclass(frozen=True)
class Inventory:
    """The parameters of one pipeline stage, and the bytes of their state summed over the ranks that share it.

    Attributes:
        rows: how many parameters there are of each kind.
        projected_bytes: the moments and bases of projected matrices.
        adamw_bytes: the moments of everything else.
        copied_bytes: the part of both that is a copy of another tensor-parallel rank's state.
        quantized_dtypes: the dtypes other than fp32 in which moments are stored.
        kernels: descriptions of the AdamW kernels that step everything that is not projected.
    """

    rows: dict[Row, int]
    projected_bytes: int
    adamw_bytes: int
    copied_bytes: int
    quantized_dtypes: tuple[str, ...]
    kernels: tuple[str, ...]


def state_bytes(slots: Sequence[Slot]) -> tuple[int, int]:
    """Bytes of state on this rank: of the projected matrices (moments and bases), and of everything else.

    Args:
        slots: all slots of the optimizer.
    """
    projected = [slot for slot in slots if slot.is_projected]
    rest = [slot for slot in slots if not slot.is_projected]
    return _bytes(projected), _bytes(rest)


def _bytes(slots: Sequence[Slot]) -> int:
    tensors = [value for slot in slots for value in slot.state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gathered_bytes(slots: Sequence[Slot]) -> int:
    """Bytes of the bases that this rank keeps gathered between refreshes, at the present ranks of the matrices.

    Args:
        slots: all slots of the optimizer.
    """
    numbers = 0
    for slot in slots:
        if not slot.state.keys().isdisjoint(BASIS_KEYS) and slot.matrix.options.keeps_bases_gathered:
            numbers += slot.rank * length(slot.geometry.compressed.held.get(slot.geometry.rank, ()))
    return 4 * numbers


def take_inventory(slots: Sequence[Slot], groups: Sequence[dist.ProcessGroup]) -> Inventory:
    """Take the inventory of this rank's pipeline stage. Collective over ``groups``.

    Args:
        slots: all slots of the optimizer.
        groups: the process groups whose ranks share the state; empty for this rank alone.
    """
    rows: dict[Row, int] = {}
    for slot in slots:
        row = _row(slot)
        rows[row] = rows.get(row, 0) + 1
    copied = sum(_bytes([slot]) * (slot.copies - 1) / slot.copies for slot in slots)
    totals = [*state_bytes(slots), copied]
    for group in groups if slots else ():
        totals = [sum(own) for own in zip(*all_gather_object(totals, group), strict=True)]
    projected_bytes, adamw_bytes, copied_bytes = (round(total) for total in totals)
    return Inventory(
        rows=rows,
        projected_bytes=projected_bytes,
        adamw_bytes=adamw_bytes,
        copied_bytes=copied_bytes,
        quantized_dtypes=tuple(sorted({slot.group["state_dtype"] for slot in slots} - {"fp32"})),
        kernels=_kernels(slots),
    )


def log_roles(title: str, slots: Sequence[Slot], executor: Executor, grid: Grid, is_local: bool) -> None:
    """Log the role table on rank 0. Collective over the ranks that share state, and over the pipeline.

    Args:
        title: the line above the table: the method, and how DeepSpeed has arranged the parameters.
        slots: all slots of this rank's optimizer.
        executor: the optimizer's.
        grid: tensor and pipeline parallelism.
        is_local: whether tensor-parallel ranks project their own shards.
    """
    groups = [executor.group] if isinstance(executor, Distributed) else []
    if is_local and grid.tensor is not None:
        groups.append(grid.tensor)
    inventory = take_inventory(slots, groups)
    stages = [inventory] if grid.pipeline is None else all_gather_object(inventory, grid.pipeline)
    if global_rank() == 0:
        ranks = executor.size * grid.pipeline_size * (grid.tensor_size if is_local else 1)
        logger.info("%s\n%s", title, role_table(stages, state_bytes(slots), ranks, gathered_bytes(slots)))


def role_table(stages: Sequence[Inventory], own_bytes: tuple[int, int], ranks: int, gathered: int = 0) -> str:
    """The role table as text, and a summary in words below it.

    Args:
        stages: the inventory of each stage of the pipeline.
        own_bytes: this rank's :func:`state_bytes`.
        ranks: over how many ranks the state is split.
        gathered: this rank's :func:`gathered_bytes`.
    """
    counts: dict[Row, int] = {}
    for stage in stages:
        for row, count in stage.rows.items():
            counts[row] = counts.get(row, 0) + count
    header = ("parameter", "count", "role", "shape", "side", "rank")
    lines = [header, *((r.name, str(n), r.role, r.shape, r.side, r.rank) for r, n in counts.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    projected = sum(count for row, count in counts.items() if row.side)
    kernels = sorted({kernel for stage in stages for kernel in stage.kernels})
    copied = sum(stage.copied_bytes for stage in stages)
    dtypes = sorted({dtype for stage in stages for dtype in stage.quantized_dtypes})
    return (
        f"{table}\n{_role_summary(projected, sum(counts.values()), kernels)}\n"
        f"State over {ranks} rank{'s' if ranks > 1 else ''}: moments and bases "
        f"{_mib(sum(stage.projected_bytes for stage in stages))}, "
        f"AdamW {_mib(sum(stage.adamw_bytes for stage in stages))}; "
        f"on this rank {_mib(own_bytes[0])} and {_mib(own_bytes[1])}."
        + (f" Gathered bases take another {_mib(gathered)} on this rank." if gathered else "")
        + (f" {_mib(copied)} of this state are copies on other tensor-parallel ranks." if copied else "")
        + (f" Moments are stored in {' and '.join(dtypes)}." if dtypes else "")
    )


def _role_summary(projected: int, total: int, kernels: Sequence[str]) -> str:
    others = total - projected
    text = f"{projected} of {total} parameters {'is' if projected == 1 else 'are'} projected"
    if not others:
        return f"{text}."
    return f"{text}; the other {f'{others} use' if others > 1 else 'uses'} {' and '.join(kernels)}."


def _kernels(slots: Sequence[Slot]) -> tuple[str, ...]:
    """Descriptions of the AdamW kernels that step everything that is not projected."""
    rest = [slot for slot in slots if not slot.is_projected]
    return tuple(sorted({_kernel(slot) for slot in rest}))


def _kernel(slot: Slot) -> str:
    if slot.is_fp32:
        return f"{adamw_by(slot.fragment.store.device)}'s fused AdamW"
    return "torch's fused AdamW on fp32 copies"  # of the moments, weights or both


def _row(slot: Slot) -> Row:
    name = re.sub(r"(?<![A-Za-z_])\d+(?![A-Za-z_])", "*", slot.tag.name)
    shape = "x".join(map(str, slot.shape)) or "scalar"
    placement = f", replicated on {slot.copies} tensor-parallel ranks" if slot.copies > 1 else ""
    if slot.logical.placement == "local":
        placement = f" as {len(slot.logical.strips)} independent shards"
    if is_tied_between_stages(slot.parameter):
        placement += ", tied: a copy on this stage"
    if not slot.is_projected:
        return Row(name, f"AdamW ({slot.role.reason}){placement}", shape, "", "")
    return Row(name, f"projected{placement}", shape, slot.geometry.side, slot.rank_text)


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
