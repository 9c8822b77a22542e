"""Checkpoints on disk. A folder with a checkpoint's name is always complete.

    SAVE/latest                          the newest tag, for DeepSpeed's own tools
    SAVE/zero_to_fp32.py                 DeepSpeed's script that turns a checkpoint into fp32 weights
    SAVE/global_step200/                 DeepSpeed's files
    SAVE/global_step200/rank_0.pt        rank 0's position in the data and its random state; one file per rank
    SAVE/global_step200/manifest.json    the files of the checkpoint, and the run it belongs to

A checkpoint is written to SAVE/.global_step200.partial and renamed once every rank has finished. A kill or a full disk
therefore never damages the previous checkpoint. SAVE must be the same directory for all ranks.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from ds_lowrank.checkpoint.deferred import DeferredErrors
from ds_lowrank.checkpoint.manifest import FILE, Identity, write_manifest
from ds_lowrank.collectives import global_rank, raise_on_all_ranks
from ds_lowrank.errors import CheckpointError

TAG = re.compile(r"global_step(\d+)")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens trained on, on all ranks together.
        seconds: time spent on training steps.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, taken from its name.

    Raises:
        CheckpointError: the name is not that of a checkpoint.
    """
    match = TAG.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: its name is not global_step followed by a number")
    return int(match[1])


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in ``directory``, oldest first."""
    if not directory.is_dir():
        return []
    complete = [path for path in directory.iterdir() if TAG.fullmatch(path.name) and (path / FILE).is_file()]
    return sorted(complete, key=step_of)


def find_checkpoint(directory: Path, choice: str) -> Path:
    """Find the checkpoint to resume from.

    Args:
        directory: where the run saves its checkpoints.
        choice: a tag in ``directory``, the path of a checkpoint, or '' for the newest one in ``directory``.

    Raises:
        CheckpointError: there is no such checkpoint, or ``directory`` has newer ones, which the run would have to
            overwrite.
    """
    complete = list_checkpoints(directory)
    if not choice:
        if not complete:
            raise CheckpointError(
                f"nothing to resume: {directory} has no complete checkpoint; leave --resume out to start"
            )
        return complete[-1]
    chosen = directory / choice if (directory / choice).is_dir() else Path(choice)
    if not chosen.is_dir():
        raise CheckpointError(f"no checkpoint {choice!r}: it is neither a tag in {directory} nor a path")
    newer = [path.name for path in complete if step_of(path) > step_of(chosen)]
    if newer:
        raise CheckpointError(
            f"{directory} has checkpoints newer than {chosen.name} ({', '.join(newer)}); to branch off there, "
            "give another --save and --output"
        )
    return chosen


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
    partial = directory / f".{tag}.partial"
    try:
        _on_first_rank(lambda: _prepare(directory, tag, partial))
        with DeferredErrors(engine) as deferred:
            engine.save_checkpoint(
                str(partial), tag=tag, client_state={"progress": asdict(progress)}, save_latest=False
            )
        with raise_on_all_ranks():
            deferred.raise_first()
            torch.save(rank_state, partial / tag / _rank_file(global_rank()))
        _on_first_rank(lambda: _complete(directory, tag, partial, identity, progress))
    except (OSError, RuntimeError, CheckpointError) as error:
        if global_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{directory / tag} was not saved: {error}; is the disk full? Earlier checkpoints are intact"
        ) from error
    _on_first_rank(lambda: _prune(directory, keep))
    return directory / tag


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path) -> tuple[Progress, dict[str, Any]]:
    """Load a checkpoint of ``save_checkpoint`` into a newly built engine. Collective.

    Returns:
        The progress of the run, and this rank's own state.

    Raises:
        CheckpointError: DeepSpeed found nothing to load.
        RemoteError: another rank failed.
    """
    loaded, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    with raise_on_all_ranks():
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {checkpoint}")
        rank_state = torch.load(checkpoint / _rank_file(global_rank()), weights_only=True)
    return Progress(**client_state["progress"]), rank_state


def _rank_file(rank: int) -> str:
    return f"rank_{rank}.pt"


def _on_first_rank(act: Callable[[], None]) -> None:
    with raise_on_all_ranks():
        if global_rank() == 0:
            act()


def _prepare(directory: Path, tag: str, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in (*directory.glob(".*.partial"), *directory.glob(".*.removed")):
        shutil.rmtree(leftover)
    if (directory / tag).exists():
        raise CheckpointError(f"{directory / tag} already exists and is not overwritten; give another --save")
    (partial / tag).mkdir(parents=True)


def _complete(directory: Path, tag: str, partial: Path, identity: Identity, progress: Progress) -> None:
    missing = [rank for rank in range(identity.ranks) if not (partial / tag / _rank_file(rank)).is_file()]
    if missing:
        raise CheckpointError(
            f"rank {missing[0]} wrote elsewhere: --save {directory} must be one directory for all ranks"
        )
    write_manifest(partial / tag, identity, asdict(progress))
    for script in partial.glob("*.py"):
        script.replace(directory / script.name)
    (partial / "latest").write_text(tag)
    (partial / tag).rename(directory / tag)
    (partial / "latest").replace(directory / "latest")
    partial.rmdir()


def _prune(directory: Path, keep: int) -> None:
    for old in list_checkpoints(directory)[:-keep]:
        removed = old.rename(directory / f".{old.name}.removed")  # first, so that a kill never leaves half a checkpoint
        shutil.rmtree(removed)
