"""What ``checkpoint list`` and ``checkpoint show`` say."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from ds_lowrank.checkpoint.choose import TAG, step_of
from ds_lowrank.checkpoint.common import COMMON, read_common, tensor_files
from ds_lowrank.checkpoint.manifest import FILE, Manifest, check_files, read_manifest
from ds_lowrank.checkpoint.saved import Saved
from ds_lowrank.errors import CheckpointError

HEADER = ("checkpoint", "step", "tokens", "saved", "size", "grid", "method", "state")
AXES = {"zero_stage": "ZeRO", "tensor_parallel": "tensor", "autotp_size": "AutoTP", "pipeline_parallel": "pipeline"}
UNITS = ("B", "kB", "MB", "GB", "TB")


def rows(directory: Path, *, read: bool = False) -> list[tuple[str, ...]]:
    """The checkpoints in a folder, in the order of their steps.

    Args:
        directory: where a run saves its checkpoints.
        read: whether to read all files; otherwise only sizes are compared.

    Returns:
        Cells as in :data:`HEADER`.

    Raises:
        CheckpointError: there is no such folder, or no checkpoint in it.
        OSError: the folder cannot be read.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder")
    folders = [path for path in directory.iterdir() if (path / FILE).is_file() or TAG.fullmatch(path.name)]
    if not folders and (directory / FILE).is_file():
        folders = [directory]
    if not folders:
        raise CheckpointError(f"{directory} has no checkpoints")
    return [_row(folder, read) for folder in sorted(folders, key=_order)]


def _order(folder: Path) -> tuple[int, str]:
    return step_of(folder) if TAG.fullmatch(folder.name) else -1, folder.name


def _row(folder: Path, read: bool) -> tuple[str, ...]:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return folder.name, *[""] * 6, _state(folder, error)
    progress = manifest.progress
    state, method = "whole", str(manifest.run.get("optimizer", ""))
    try:
        check_files(folder, manifest, slice(None) if read else slice(0))
        if COMMON in manifest.files:  # otherwise DeepSpeed saved for an optimizer of its own
            method = str(read_common(folder)["optimizer"]["method"])
    except (CheckpointError, OSError, KeyError, TypeError) as error:
        state = _state(folder, error)
    date = datetime.fromtimestamp((folder / FILE).stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    size = size_text(sum(sealed.bytes for sealed in manifest.files.values()))
    return folder.name, str(progress.step), f"{progress.tokens:,}", date, size, grid_text(manifest), method, state


def _state(folder: Path, error: Exception) -> str:
    return " ".join(str(error).split()).replace(f"{folder} is ", "").replace(f"{folder}/", "")


def table(lines: list[tuple[str, ...]]) -> str:
    """Cells in columns.

    Args:
        lines: of equally many cells.
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def size_text(size: float) -> str:
    """Bytes as a person reads them.

    Args:
        size: in bytes.
    """
    unit = 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {UNITS[unit]}" if unit else f"{size:.0f} B"


def grid_text(manifest: Manifest) -> str:
    """The grid that saved a checkpoint.

    Args:
        manifest: of the checkpoint.
    """
    ranks = len(tensor_files(manifest)) or int(manifest.run.get("ranks", 1))
    run = {**manifest.run, **manifest.run.get("grid", {})}
    axes = [f"{label} {run[key]}" for key, label in AXES.items() if key in run and (run[key] != 1 or label == "ZeRO")]
    return ", ".join([f"{ranks} rank{'' if ranks == 1 else 's'}", *axes])


def show(saved: Saved) -> str:
    """A checkpoint as text: how far it is, the model, the options of each group, bytes by kind, the projected matrices.

    Args:
        saved: the open checkpoint.
    """
    manifest, state = saved.manifest, saved.common["optimizer"]
    size = sum(sealed.bytes for sealed in manifest.files.values())
    lines = [
        f"{saved.folder}: step {manifest.progress.step}, {manifest.progress.tokens:,} tokens, {size_text(size)} in "
        f"{len(manifest.files)} files, saved by {grid_text(manifest)}"
    ]
    if "model" in manifest.run:
        lines.append(f"model: {_plain(manifest.run['model'])}")
    lines.append(f"method: {state['method']}")
    for number, group in enumerate(state["groups"]):
        lines.append(f"group {number}, {len(group['names'])} matrices and vectors: {_plain(group['settings'])}")
    kinds = bytes_by_kind(saved)
    lines.append("bytes: " + ", ".join(f"{kind} {size_text(count)}" for kind, count in kinds.items()))
    return "\n".join([*lines, *_matrices(saved)])


def bytes_by_kind(saved: Saved) -> dict[str, int]:
    """Bytes of weights, of bases, of moments and what else belongs to a method, of projected matrices and of the rest.

    Args:
        saved: the open checkpoint.
    """
    found = dict.fromkeys(("weights", "bases", "moments of projected matrices", "moments of the rest"), 0)
    projected = set(saved.common["optimizer"]["projected"])
    for key in saved.tensors:
        name, _, state = key.partition("/")
        kind = "moments of projected matrices" if name in projected else "moments of the rest"
        if not state:
            kind = "weights"
        elif state.startswith(("basis", "indices")) and name in projected and "exp_avg" not in state:
            kind = "bases"
        found[kind] += saved.tensors.nbytes(key)
    return found


def _matrices(saved: Saved) -> list[str]:
    """A line for the projected matrices of each shape and rank."""
    state = saved.common["optimizer"]
    found: dict[tuple[tuple[int, ...], int | None], list[str]] = {}
    for name in state["projected"]:
        shape = saved.tensors.shape(name) if saved.tensors.has(name) else ()
        found.setdefault((shape, _rank(saved, name)), []).append(name)
    return [
        f"{len(names)} projected of {' x '.join(map(str, shape)) or 'local shards'}"
        + (f", rank {rank}" if rank is not None else "")
        + f": {names[0]}"
        + (", ..." if names[1:] else "")
        for (shape, rank), names in sorted(found.items(), key=lambda item: item[1][0])
    ]


def _rank(saved: Saved, name: str) -> int | None:
    """The rank of a matrix: what its state says, or the columns of its basis or moments."""
    said = saved.common["optimizer"]["values"][name].get("rank")
    for key in () if said is not None else ("basis", "exp_avg"):
        if saved.tensors.has(f"{name}/{key}"):
            return saved.tensors.shape(f"{name}/{key}")[-1]
    return None if said is None else int(said)


def _plain(settings: dict[str, Any]) -> str:
    return json.dumps(settings, default=str, separators=(", ", " "))[1:-1].replace('"', "")
