"""The role table: every parameter, what is done to it, and what its state costs."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_lowrank.collectives import all_gather_object, global_rank
from ds_lowrank.environment.apex import adamw_by
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.placement.grid import Grid
from ds_lowrank.placement.marks import is_tied_between_stages
from ds_lowrank.sharding.reduce import Distributed, Executor

logger = logging.getLogger("ds_lowrank")


@dataclass(frozen=True)
class Row:
    """One kind of parameter: those alike but for the numbers in their names."""

    name: str
    role: str
    shape: str
    side: str
    rank: str


@dataclass(frozen=True)
class Inventory:
    """What the ranks of one pipeline stage have.

    Attributes:
        rows: kinds of parameters, and how many there are of each.
        projected, rest: bytes of state over the ranks that share it: moments and bases, and AdamW's.
        copies: how many of these bytes are copies of what another tensor-parallel rank has.
        coded: other dtypes than fp32 in which moments are stored.
        kernels: whose AdamW steps what is not projected.
    """

    rows: dict[Row, int]
    projected: int
    rest: int
    copies: int
    coded: tuple[str, ...]
    kernels: tuple[str, ...]


def state_bytes(slots: Sequence[Slot]) -> tuple[int, int]:
    """Bytes of state on this rank: of the projected matrices (moments and bases), and of everything else."""
    projected = [slot for slot in slots if slot.is_projected]
    rest = [slot for slot in slots if not slot.is_projected]
    return _bytes(projected), _bytes(rest)


def _bytes(slots: Sequence[Slot]) -> int:
    tensors = [value for slot in slots for value in slot.state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def take_inventory(slots: Sequence[Slot], groups: Sequence[dist.ProcessGroup]) -> Inventory:
    """Of this rank's stage. Collective over the groups whose ranks have the state between them."""
    rows: dict[Row, int] = {}
    for slot in slots:
        row = _row(slot)
        rows[row] = rows.get(row, 0) + 1
    copies = sum(_bytes([slot]) * (slot.copies - 1) / slot.copies for slot in slots)
    totals = torch.tensor([*state_bytes(slots), copies], dtype=torch.float64)
    for group in groups if slots else ():
        totals = totals.to(slots[0].fragment.store.device)
        dist.all_reduce(totals, group=group)
    coded = tuple(sorted({slot.group["state_dtype"] for slot in slots} - {"fp32"}))
    projected, rest, copied = (round(total) for total in totals.tolist())
    return Inventory(rows, projected, rest, copied, coded, _kernels(slots))


def log_roles(title: str, slots: Sequence[Slot], executor: Executor, grid: Grid, is_local: bool) -> None:
    """Log the role table on rank 0. Collective over the ranks that share state, and over the pipeline.

    Args:
        title: the method, and what DeepSpeed made of the parameters.
        slots: of this rank.
        executor: of the optimizer.
        grid: tensor and pipeline parallelism.
        is_local: whether tensor-parallel ranks project their own shards.
    """
    groups = [executor.group] if isinstance(executor, Distributed) else []
    if is_local and grid.tensor is not None:
        groups.append(grid.tensor)
    own = take_inventory(slots, groups)
    stages = [own] if grid.pipeline is None else all_gather_object(own, grid.pipeline)
    if global_rank() == 0:
        ranks = executor.size * grid.pipeline_size * (grid.tensor_size if is_local else 1)
        logger.info("%s\n%s", title, role_table(stages, state_bytes(slots), ranks))


def role_table(stages: Sequence[Inventory], here: tuple[int, int], world: int) -> str:
    """The table as text.

    Args:
        stages: of the pipeline.
        here: this rank's :func:`state_bytes`.
        world: over how many ranks state is split.
    """
    counts: dict[Row, int] = {}
    for stage in stages:
        for row, count in stage.rows.items():
            counts[row] = counts.get(row, 0) + count
    header = ("parameter", "count", "role", "shape", "side", "rank")
    lines = [header, *((r.name, str(n), r.role, r.shape, r.side, r.rank) for r, n in counts.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    matrices = sum(count for row, count in counts.items() if row.side)
    copies = sum(stage.copies for stage in stages)
    coded = sorted({code for stage in stages for code in stage.coded})
    kernels = sorted({kernel for stage in stages for kernel in stage.kernels})
    by = f" by {' and '.join(kernels)}" if kernels else ""
    return (
        f"{table}\n{matrices} of {sum(counts.values())} parameters are projected, the others take AdamW{by}.\n"
        f"State over {world} rank{'s' if world > 1 else ''}: moments and bases "
        f"{_mib(sum(stage.projected for stage in stages))}, AdamW {_mib(sum(stage.rest for stage in stages))}; "
        f"on this rank {_mib(here[0])} and {_mib(here[1])}."
        + (f" {_mib(copies)} of it are copies on other tensor-parallel ranks." if copies else "")
        + (f" Moments are stored in {' and '.join(coded)}." if coded else "")
    )


def _kernels(slots: Sequence[Slot]) -> tuple[str, ...]:
    """Whose AdamW kernel steps what is not projected."""
    rest = [slot for slot in slots if not slot.is_projected]
    return tuple(sorted({adamw_by(slot.fragment.store.device) if slot.is_fp32 else "torch" for slot in rest}))


def _row(slot: Slot) -> Row:
    name = re.sub(r"(?<![A-Za-z_])\d+(?![A-Za-z_])", "*", slot.tag.name)
    shape = "x".join(map(str, slot.shape)) or "scalar"
    held = f", on each of {slot.copies} tensor ranks" if slot.copies > 1 else ""
    if slot.logical.placement == "local":
        held = f", as {len(slot.logical.strips)} shards apart"
    if is_tied_between_stages(slot.parameter):
        held += ", tied: a copy on this stage"
    if not slot.is_projected:
        return Row(name, f"AdamW ({slot.role.reason}){held}", shape, "", "")
    return Row(name, f"projected{held}", shape, slot.shard.side, slot.rank_text)


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
