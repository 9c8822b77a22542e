"""A state that knows no grid: what it has besides tensors, and loading all of it into an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ds_lowrank.errors import CheckpointError
from ds_lowrank.methods.blocks.state_spec import Formats
from ds_lowrank.optimizer.rows import load_rows, needed_tensors
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.state_dict import frozen_since, refuse_frozen
from ds_lowrank.sharding.pieces import Source

FORMAT = 1
Parts = Literal["all", "state", "rest"]
"""``all``: the state, and the options that the groups had. ``state``: with the options of this run. ``rest``: of it the
moments of what AdamW steps, while the method begins anew."""
FORMATS = ("state_dtype", "basis_dtype")
"""Options that name formats in which numbers are stored."""
CONVERTED = frozenset({*FORMATS, "master_weights"})
"""Options that decide how numbers are stored: they are converted, and so need not be those of the saving run."""
STORED = CONVERTED | {"reduction", "projected_gradient_clipping", "matmul_precision", "basis_placement"}
"""Options that say how a step is computed and its state is stored, not which step it is: those of the resumed run."""
NOT_RESTORED = STORED | {"target_modules", "exclude_modules"}
"""These, and options that have been applied already."""


def plain_state(
    method: str, slots: Sequence[Slot], groups: Sequence[dict[str, Any]], counts: Mapping[str, int]
) -> dict[str, Any]:
    """What this rank's state has besides tensors, in plain values: the same on all ranks with the same parameters.

    Args:
        method: the method's name.
        slots: all slots of the optimizer.
        groups: its parameter groups, in order.
        counts: its counters, by name.
    """
    return {
        "format": FORMAT,
        "method": method,
        "counts": dict(counts),
        "values": {slot.tag.name: slot.plain_values for slot in slots},
        "projected": [slot.tag.name for slot in slots if slot.is_projected],
        "groups": [
            {
                "settings": {key: value for key, value in group.items() if key != "params"},
                "names": [slot.tag.name for slot in slots if slot.group is group],
            }
            for group in groups
        ],
    }


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The plain states of different pipeline stages, and of ranks with matrices of their own, as one.

    Args:
        states: at least one.

    Returns:
        One state; a group for each number and settings of a group, with the names of all.
    """
    found: dict[str, Any] = {**states[0], "values": {}, "projected": [], "groups": []}
    for state in states:
        found["values"] |= state["values"]
        found["projected"] = sorted({*found["projected"], *state["projected"]})
    for number in range(max(len(state["groups"]) for state in states)):
        own: list[dict[str, Any]] = []
        for group in (state["groups"][number] for state in states if number < len(state["groups"])):
            same = next((one for one in own if one["settings"] == group["settings"]), None)
            if same is None:
                own.append({"settings": group["settings"], "names": list(group["names"])})
            else:
                same["names"] = list(dict.fromkeys([*same["names"], *group["names"]]))
        found["groups"] += own
    return found


def load_everything(
    method: str,
    slots: Sequence[Slot],
    groups: Sequence[dict[str, Any]],
    source: Source,
    saved: Mapping[str, Any],
    fixed_on_resume: Iterable[str],
    frozen: Sequence[str],
    parts: Parts,
) -> dict[str, int]:
    """Load a state into slots and groups. Everything is checked before anything is changed.

    Args:
        method: the name of the optimizer's method.
        slots: all slots of the optimizer.
        groups: its groups, in order; with ``all`` parts, their options are replaced.
        source: the tensors that were saved.
        saved: what :func:`merged` returned.
        fixed_on_resume: options that must have the same values in the saved groups and in these.
        frozen: names of the parameters that have no slots because they are frozen.
        parts: what is loaded.

    Returns:
        The saved counters, by name.

    Raises:
        CheckpointError: the state does not fit this optimizer.
    """
    if saved.get("format") != FORMAT:
        raise CheckpointError(f"the checkpoint has state format {saved.get('format')}, this version reads {FORMAT}")
    if parts == "rest":
        slots = [s for s in slots if not s.is_projected and s.tag.name in saved["values"]]
        slots = [s for s in slots if s.tag.name not in saved["projected"]]
    else:
        _check_method(method, saved)
        _check_names(slots, saved, frozen)
    chosen = [_saved_group(slots, number, group, saved, parts) for number, group in enumerate(groups)]
    if parts != "rest":
        for group, found in zip(groups, chosen, strict=True):
            _check_fixed(group, found["settings"], fixed_on_resume)
    own = [[slot for slot in slots if slot.group is group] for group in groups]
    for members, found in zip(own, chosen, strict=True):
        for slot in members:
            _check_tensors(slot, source, saved["values"][slot.tag.name], _formats(found["settings"]))
    for members, found, group in zip(own, chosen, groups, strict=True):
        load_rows(members, source, saved["values"], _formats(found["settings"]))
        if parts == "all":
            group.update({key: value for key, value in found["settings"].items() if key not in NOT_RESTORED})
    return dict(saved["counts"]) if parts != "rest" else {}


def _formats(settings: Mapping[str, Any]) -> Formats:
    """The formats that a group was saved in; what a checkpoint does not name had none but fp32."""
    return {key: settings.get(key, "fp32") for key in FORMATS}


def _check_method(method: str, saved: Mapping[str, Any]) -> None:
    if saved["method"] != method:
        raise CheckpointError(
            f"the checkpoint was saved by {saved['method']}, this run uses {method}: set optimizer.type to "
            f"{saved['method']!r}, or keep the weights and begin with a new state: --reset-optimizer, or "
            "load_optimizer_states=False"
        )


def _check_names(slots: Sequence[Slot], saved: Mapping[str, Any], frozen: Sequence[str]) -> None:
    own = {slot.tag.name for slot in slots}
    refuse_frozen(frozen_since(set(saved["values"]) - own, frozen))
    missing = sorted(own - set(saved["values"]))
    if missing:
        local = [name for name in missing if "@tensor" in name]
        if local and len(local) == len(missing):
            raise CheckpointError(
                f"the checkpoint has no {missing[0]}: with tensor_parallel_projection 'local' every tensor-parallel "
                "rank has matrices of its own, and a run can only be resumed with as many of these ranks"
            )
        raise CheckpointError(
            f"the checkpoint belongs to another model: it lacks the state of {missing[0]} ({len(missing)} parameters "
            "in all)"
        )
    projected = set(saved["projected"])
    for slot in slots:
        if slot.is_projected != (slot.tag.name in projected):
            here, there = ("projected", "not projected") if slot.is_projected else ("not projected", "projected")
            raise CheckpointError(
                f"{slot.tag.name} is {here} in this run and was {there} in the run that saved the checkpoint: use its "
                "target_modules and exclude_modules"
            )


def _saved_group(
    slots: Sequence[Slot], number: int, group: dict[str, Any], saved: Mapping[str, Any], parts: Parts
) -> dict[str, Any]:
    """The saved group that has the parameters of a group; for one without parameters, that of its number."""
    names = {slot.tag.name for slot in slots if slot.group is group}
    stored: list[dict[str, Any]] = saved["groups"]
    if not names:
        return stored[min(number, len(stored) - 1)]
    holding = [one for one in stored if names & set(one["names"])]
    if len(holding) != 1 and parts != "rest":
        raise CheckpointError(
            f"parameter group {number} has parameters of {len(holding)} groups of the checkpoint: build the groups as "
            "in the run that saved it"
        )
    return holding[0]


def _check_fixed(group: dict[str, Any], stored: Mapping[str, Any], fixed_on_resume: Iterable[str]) -> None:
    for key in fixed_on_resume:
        if key in stored and key not in CONVERTED and stored[key] != group[key]:
            raise CheckpointError(
                f"{key} is {stored[key]!r} in the checkpoint and {group[key]!r} in this run, which cannot use state "
                f"saved with another value: set {key} to {stored[key]!r}, or begin with a new state of the matrices: "
                "--reset-optimizer projected"
            )


def _check_tensors(slot: Slot, source: Source, values: Mapping[str, Any], saved_as: Formats) -> None:
    if set(values) != set(slot.plain_values):
        raise CheckpointError(
            f"{slot.tag.name}: the checkpoint has {sorted(values)}, this run needs {sorted(slot.plain_values)}"
        )
    for name, shape in needed_tensors(slot, slot.state_store.rank_of(dict(values)), source, saved_as).items():
        if not source.has(name):
            raise CheckpointError(f"the checkpoint has no {name}: use the optimizer.params of the run that saved it")
        if tuple(source.shape(name)) != tuple(shape):
            raise CheckpointError(
                f"{name} is {tuple(source.shape(name))} in the checkpoint and {tuple(shape)} in this run: use the "
                "rank and other optimizer.params of the run that saved it"
            )
