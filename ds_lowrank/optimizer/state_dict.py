"""Converts an optimizer's state to a dict of tensors and plain values, and back.

Tensors are stored by the name of their matrix, along with its logical shape and the rectangles of it that this rank
holds. A reader on another layout needs these to reassemble the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ds_lowrank.errors import CheckpointError
from ds_lowrank.optimizer.slots import Slot

FORMAT = 4
"""The version of the dict's structure; a dict of another version is refused."""


def dump_state(
    method: str, slots: Sequence[Slot], groups: Sequence[dict[str, Any]], counts: Mapping[str, int]
) -> dict[str, Any]:
    """This rank's state as a dict that ``torch.load(weights_only=True)`` can read.

    Args:
        method: the method's name.
        slots: all slots of the optimizer.
        groups: its parameter groups, in order.
        counts: its counters, by name.

    Returns:
        The dict. Its tensors are the state itself, not copies.
    """
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
    frozen: Sequence[str],
) -> dict[str, int]:
    """Load a saved state into slots and parameter groups.

    Args:
        method: the name of the optimizer's method.
        slots: all slots of the optimizer; their state is replaced by copies on their devices.
        groups: its parameter groups, in order; their options are replaced.
        saved: what :func:`dump_state` returned on the same layout.
        fixed_on_resume: options that must have the same values in the saved groups and in these.
        frozen: names of the parameters that have no slots because they are frozen.

    Returns:
        The saved counters, by name.

    Raises:
        CheckpointError: the state does not fit this optimizer; nothing was changed.
    """
    _check_origin(method, saved)
    _check_names({slot.tag.name for slot in slots}, set(saved["layout"]), frozen)
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
        "side": slot.geometry.side if slot.is_projected else "none",
        "world": len(slot.geometry.parts),
        "held": [[r.row, r.col, r.height, r.width] for r in slot.geometry.part.rectangles],
    }


def _names(slots: Sequence[Slot], group: dict[str, Any]) -> list[str]:
    return [slot.tag.name for slot in slots if slot.group is group]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _check_origin(method: str, saved: dict[str, Any]) -> None:
    if "optimizer_state_dict" in saved:
        raise CheckpointError(
            "the checkpoint was saved by a run for which DeepSpeed kept fp32 copies of the weights, and this run has "
            "none: set bf16.enabled, and leave optimizer.params.master_weights at true"
        )
    if "method" not in saved or "layout" not in saved:
        raise CheckpointError(f"the checkpoint's optimizer state was not saved by ds_lowrank; this run uses {method}")
    if saved["method"] != method:
        raise CheckpointError(
            f"the checkpoint was saved by {saved['method']}, this run uses {method}: set optimizer.type to "
            f"{saved['method']!r}, or load the weights only (load_optimizer_states=False)"
        )
    if saved["format"] != FORMAT:
        raise CheckpointError(f"the checkpoint has state format {saved['format']}, this version reads {FORMAT}")


def frozen_since(names: Iterable[str], frozen: Sequence[str]) -> list[str]:
    """What was trained in the run that saved a state and is frozen in this one, in order.

    Args:
        names: of matrices and vectors that only the saved state has.
        frozen: the names of this run's frozen parameters.
    """
    return sorted(name for name in names if any(f"{name}.".startswith(f"{given}.") for given in frozen))


def refuse_frozen(late: Sequence[str]) -> None:
    """Refuse a state if something that it has is frozen in this run.

    Args:
        late: from :func:`frozen_since`.

    Raises:
        CheckpointError: there is something.
    """
    if late:
        raise CheckpointError(
            f"{late[0]} is frozen, but was trained in the run that saved the checkpoint ({len(late)} such parameters "
            "in all): unfreeze them before loading"
        )


def _check_names(own: set[str], saved: set[str], frozen: Sequence[str]) -> None:
    late = frozen_since(saved - own, frozen)
    if set(late) == saved - own:
        refuse_frozen(late)
    if own != saved:
        missing, extra = sorted(own - saved)[:3], sorted(saved - own)[:3]
        raise CheckpointError(
            f"the checkpoint belongs to another model: it lacks {missing or 'nothing'}, and this model lacks "
            f"{extra or 'nothing'}"
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
                f"parameter group {index} has other parameters in the checkpoint than in this run: build the groups as "
                "in the run that saved it"
            )
        for key in fixed_on_resume:
            if key in saved and saved[key] != group[key]:  # it may be newer than the checkpoint
                raise CheckpointError(
                    f"{key} is {saved[key]!r} in the checkpoint and {group[key]!r} in this run, which cannot use state "
                    f"saved with another value: set {key} to {saved[key]!r}"
                )


def _check_slot(slot: Slot, saved: dict[str, Any]) -> None:
    name, own, stored = slot.tag.name, _layout(slot), saved["layout"][slot.tag.name]
    for key, value in own.items():
        if stored[key] != value:
            raise CheckpointError(
                f"{name}: {key} is {stored[key]} in the checkpoint and {value} in this run. Resume with the ZeRO "
                "stage, grid of ranks, model and optimizer.params of the run that saved it"
            )
    tensors = saved["state"][name]
    if set(tensors) != set(slot.state):
        raise CheckpointError(f"{name}: the checkpoint has {sorted(tensors)}, this run needs {sorted(slot.state)}")
    for key, (shape, dtype) in slot.state_store.tensors(slot.state_store.rank_of(tensors)).items():
        found = tensors[key]
        if (tuple(found.shape), found.dtype) != (shape, dtype):
            raise CheckpointError(
                f"{name}: {key} is {tuple(found.shape)} {found.dtype} in the checkpoint and {shape} {dtype} in this "
                "run: use the rank, state_dtype and other optimizer.params of the run that saved it"
            )
