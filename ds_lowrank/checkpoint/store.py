"""Checkpoints with DeepSpeed's own files, of runs whose optimizer is none of this package: of one layout only.

    SAVE/latest                          the newest tag, for DeepSpeed's own tools
    SAVE/zero_to_fp32.py                 DeepSpeed's script that turns a checkpoint into fp32 weights
    SAVE/global_step200/                 DeepSpeed's files
    SAVE/global_step200/rank_0.pt        rank 0's position in the data and its random state; one file per rank
    SAVE/global_step200/manifest.json    the files of the checkpoint, their checksums, and the run they belong to

The folder is made and named as that of every checkpoint (:mod:`ds_lowrank.checkpoint.folder`).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from ds_lowrank.checkpoint.deferred import DeferredErrors
from ds_lowrank.checkpoint.folder import (
    advice,
    complete,
    merged,
    on_first_rank,
    partial_of,
    prepare,
    prune,
    share_of_files,
)
from ds_lowrank.checkpoint.manifest import Identity, Progress, read_manifest, seal
from ds_lowrank.checkpoint.owned import is_owned
from ds_lowrank.checkpoint.restricted_load import read_data, restricted
from ds_lowrank.collectives import all_gather_object, global_rank, raise_on_all_ranks
from ds_lowrank.errors import CheckpointError


def save_checkpoint(
    engine: DeepSpeedEngine,
    directory: Path,
    identity: Identity,
    progress: Progress,
    rank_state: dict[str, Any],
    keep: int,
) -> Path:
    """Save a checkpoint after step ``progress.step`` and delete old ones. Collective.

    Args:
        engine: its model, optimizer and scheduler are saved.
        directory: where the run saves its checkpoints; the same directory for all ranks.
        identity: identifies the run.
        progress: how far the run is.
        rank_state: this rank's own state, loadable with ``torch.load(weights_only=True)``.
        keep: how many of the newest checkpoints to keep.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: any rank failed; raised on all ranks. ``directory`` is then unchanged.
    """
    tag = f"global_step{progress.step}"
    partial = partial_of(directory, tag)
    try:
        on_first_rank(lambda: prepare(directory, tag))
        with DeferredErrors(engine) as deferred:
            engine.save_checkpoint(
                str(partial), tag=tag, client_state={"progress": asdict(progress)}, save_latest=False
            )
        with raise_on_all_ranks():
            deferred.raise_first()
            own = partial / tag / _rank_file(global_rank())
            torch.save({"rank": global_rank(), "progress": asdict(progress), "state": rank_state}, own)
            written = {path.relative_to(partial / tag).as_posix(): seal(path) for path in [*deferred.written, own]}
        files = merged(all_gather_object(written))
        wanted = [_rank_file(rank) for rank in range(identity.ranks)]
        on_first_rank(lambda: complete(directory, tag, asdict(identity), progress, files, wanted))
    except (OSError, RuntimeError, CheckpointError) as error:
        if global_rank() == 0 and is_owned(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{directory / tag} was not saved: {error}{advice(error)}. Earlier checkpoints are intact"
        ) from error
    try:
        on_first_rank(lambda: prune(directory, keep))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory / tag} was saved, but an older checkpoint was not deleted: {error}"
        ) from error
    return directory / tag


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path) -> tuple[Progress, dict[str, Any]]:
    """Load a checkpoint of ``save_checkpoint`` into a newly built engine. Collective.

    Its files must have been checked with ``check_whole``. Nothing in them is run, even so.

    Returns:
        The progress of the run, and this rank's own state.

    Raises:
        CheckpointError: a file is not what ``save_checkpoint`` writes, or does not fit the engine.
        RemoteError: another rank failed.
    """
    with raise_on_all_ranks():
        manifest = read_manifest(checkpoint)
        for name in sorted(manifest.files)[share_of_files()]:
            if name.endswith(".pt"):
                read_data(checkpoint / name, "meta")  # before the engine, whose collectives a refusal would leave
        own = _own_state(checkpoint, manifest.progress)
    try:
        with restricted(engine):
            loaded, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    except CheckpointError:
        raise
    except Exception as error:  # DeepSpeed raises whatever its reading of a dict leads to, maybe on this rank only
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{checkpoint} does not fit this run: {type(error).__name__}: {first}") from error
    with raise_on_all_ranks():
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {checkpoint}")
        _check_progress(checkpoint, "DeepSpeed's files", client_state.get("progress"), manifest.progress)
    return manifest.progress, own


def _own_state(checkpoint: Path, progress: Progress) -> dict[str, Any]:
    """This rank's own state, from a file that must be this rank's and of the checkpoint's step."""
    name = _rank_file(global_rank())
    found = read_data(checkpoint / name)
    if not isinstance(found, dict) or found.get("rank") != global_rank() or not isinstance(found.get("state"), dict):
        raise CheckpointError(f"{checkpoint} is damaged: {name} is not of rank {global_rank()}")
    _check_progress(checkpoint, name, found.get("progress"), progress)
    state: dict[str, Any] = found["state"]
    return state


def _check_progress(checkpoint: Path, name: str, found: Any, progress: Progress) -> None:
    values = (found.get("step"), found.get("tokens")) if isinstance(found, dict) else (None, None)
    if values != (progress.step, progress.tokens):  # each rank measures its own seconds
        raise CheckpointError(
            f"{checkpoint} mixes files of several checkpoints: {name} is of step {values[0]}, the manifest of step "
            f"{progress.step}; resume from another checkpoint"
        )


def _rank_file(rank: int) -> str:
    return f"rank_{rank}.pt"
