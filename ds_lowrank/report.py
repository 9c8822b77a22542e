"""The role table: every parameter, what is done to it, and what its state costs."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_lowrank.apex import adamw_by
from ds_lowrank.slots import Slot

logger = logging.getLogger("ds_lowrank")


@dataclass(frozen=True)
class Row:
    """One kind of parameter: those alike but for the numbers in their names."""

    name: str
    role: str
    shape: str
    side: str
    rank: str


def state_bytes(slots: Sequence[Slot]) -> tuple[int, int]:
    """Bytes of state on this rank: of the projected matrices (moments and bases), and of everything else."""
    projected = [slot for slot in slots if slot.is_projected]
    rest = [slot for slot in slots if not slot.is_projected]
    return _bytes(projected), _bytes(rest)


def _bytes(slots: Sequence[Slot]) -> int:
    tensors = [value for slot in slots for value in slot.state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def role_table(slots: Sequence[Slot], totals: tuple[int, int], world: int) -> str:
    """The table as text.

    Args:
        slots: of this rank.
        totals: bytes of state of projected matrices and of the rest, summed over the ranks.
        world: over how many ranks state is split.
    """
    counts: dict[Row, int] = {}
    for slot in slots:
        row = _row(slot)
        counts[row] = counts.get(row, 0) + 1
    header = ("parameter", "count", "role", "shape", "side", "rank")
    lines = [header, *((r.name, str(n), r.role, r.shape, r.side, r.rank) for r, n in counts.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    matrices = sum(1 for slot in slots if slot.is_projected)
    here = state_bytes(slots)
    coded = sorted({slot.group["state_dtype"] for slot in slots} - {"fp32"})
    return (
        f"{table}\n{matrices} of {len(slots)} parameters are projected, the others take AdamW{_kernels(slots)}.\n"
        f"State over {world} rank{'s' if world > 1 else ''}: moments and bases {_mib(totals[0])}, "
        f"AdamW {_mib(totals[1])}; on this rank {_mib(here[0])} and {_mib(here[1])}."
        + (f" Moments are stored in {' and '.join(coded)}." if coded else "")
    )


def _kernels(slots: Sequence[Slot]) -> str:
    """Whose AdamW kernel steps what is not projected."""
    rest = [slot for slot in slots if not slot.is_projected]
    names = {adamw_by(slot.fragment.store.device) if slot.is_fp32 else "torch" for slot in rest}
    return f" by {' and '.join(sorted(names))}" if names else ""


def _row(slot: Slot) -> Row:
    name = re.sub(r"(?<![A-Za-z_])\d+(?![A-Za-z_])", "*", slot.tag.name)
    shape = "x".join(map(str, slot.shape)) or "scalar"
    if not slot.is_projected:
        return Row(name, f"AdamW ({slot.role.reason})", shape, "", "")
    return Row(name, "projected", shape, slot.shard.side, slot.rank_text)


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
