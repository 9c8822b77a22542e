"""An optimizer's state as a dict of tensors and plain values, and back.

Every tensor stands under its matrix's name, with the logical shape and the rectangles of it that this rank holds: what
a reader on another layout needs to put it together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ds_lowrank.errors import CheckpointError
from ds_lowrank.optimizer.slots import Slot

FORMAT = 4


def dump_state(
    method: str, slots: Sequence[Slot], groups: Sequence[dict[str, Any]], counts: Mapping[str, int]
) -> dict[str, Any]:
    """The ``state_dict`` of this rank."""
    return {
        "format": FORMAT,
        "method": method,
        "counts": dict(counts),
        "layout": {slot.tag.name: _layout(slot) for slot in slots},
        "state": {slot.tag.name: dict(slot.state) for slot in slots},
        "param_groups": [{**_settings(group), "params": _names(slots, group)} for group in groups],
    }


def load_state(
    method: str,
    slots: Sequence[Slot],
    groups: Sequence[dict[str, Any]],
    saved: dict[str, Any],
    fixed_on_resume: Iterable[str],
) -> dict[str, int]:
    """Put a saved state into the slots and groups.

    Args:
        fixed_on_resume: the options that must be those of the saved groups.

    Returns:
        The saved counts.

    Raises:
        CheckpointError: anything does not fit. Then nothing was changed.
    """
    _check_origin(method, saved)
    _check_names({slot.tag.name for slot in slots}, set(saved["layout"]))
    _check_groups(slots, groups, saved["param_groups"], fixed_on_resume)
    for slot in slots:
        _check_slot(slot, saved)
    for slot in slots:
        for key, value in saved["state"][slot.tag.name].items():
            own = slot.state[key]
            slot.state[key] = value.to(own.device, copy=True) if isinstance(value, torch.Tensor) else value
    for group, stored in zip(groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in stored.items() if key != "params"})
    return dict(saved["counts"])


def _layout(slot: Slot) -> dict[str, Any]:
    return {
        "shape": list(slot.shape),
        "side": slot.shard.side if slot.is_projected else "none",
        "world": len(slot.shard.parts),
        "held": [[r.row, r.col, r.height, r.width] for r in slot.shard.part.rectangles],
    }


def _names(slots: Sequence[Slot], group: dict[str, Any]) -> list[str]:
    return [slot.tag.name for slot in slots if slot.group is group]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _check_origin(method: str, saved: dict[str, Any]) -> None:
    if "method" not in saved or "layout" not in saved:
        raise CheckpointError(f"the checkpoint's optimizer state was not saved by ds_lowrank; this run uses {method}")
    if saved["method"] != method:
        raise CheckpointError(
            f"the checkpoint was saved by {saved['method']}, this run uses {method}: set optimizer.type to "
            f"{saved['method']!r}, or load the weights only (load_optimizer_states=False)"
        )
    if saved["format"] != FORMAT:
        raise CheckpointError(f"the checkpoint has state format {saved['format']}, this version reads {FORMAT}")


def _check_names(own: set[str], saved: set[str]) -> None:
    if own != saved:
        missing, extra = sorted(own - saved)[:3], sorted(saved - own)[:3]
        raise CheckpointError(
            f"the checkpoint is of another model: it lacks {missing or 'nothing'} and has {extra or 'nothing'} besides"
        )


def _check_groups(
    slots: Sequence[Slot],
    groups: Sequence[dict[str, Any]],
    stored: Sequence[dict[str, Any]],
    fixed_on_resume: Iterable[str],
) -> None:
    if len(stored) != len(groups):
        raise CheckpointError(f"the checkpoint has {len(stored)} parameter groups, this run {len(groups)}")
    for index, (group, saved) in enumerate(zip(groups, stored, strict=True)):
        if saved["params"] != _names(slots, group):
            raise CheckpointError(
                f"parameter group {index} holds other parameters in the checkpoint than in this run: make the groups "
                "as the run that saved it did"
            )
        for key in fixed_on_resume:
            if saved[key] != group[key]:
                raise CheckpointError(
                    f"{key} is {saved[key]!r} in the checkpoint and {group[key]!r} in this run, and the state of one "
                    "cannot be read as that of the other: use the value that saved it"
                )


def _check_slot(slot: Slot, saved: dict[str, Any]) -> None:
    name, own, stored = slot.tag.name, _layout(slot), saved["layout"][slot.tag.name]
    for key, value in own.items():
        if stored[key] != value:
            raise CheckpointError(
                f"{name}: {key} is {stored[key]} in the checkpoint and {value} in this run. Resume with the ZeRO "
                "stage, the grid of ranks, the model and the optimizer.params that saved it"
            )
    tensors = saved["state"][name]
    if set(tensors) != set(slot.state):
        raise CheckpointError(f"{name}: the checkpoint holds {sorted(tensors)}, this run needs {sorted(slot.state)}")
    for key, (shape, dtype) in slot.state_store.tensors(slot.state_store.rank_of(tensors)).items():
        found = tensors[key]
        if (tuple(found.shape), found.dtype) != (shape, dtype):
            raise CheckpointError(
                f"{name}: {key} is {tuple(found.shape)} {found.dtype} in the checkpoint and {shape} {dtype} in this "
                "run: use the rank, state_dtype and other optimizer.params that saved it"
            )
