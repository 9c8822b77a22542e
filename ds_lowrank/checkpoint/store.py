"""Checkpoints on disk: either whole under their own name, or not there.

    SAVE/latest                          the newest tag, for DeepSpeed's own tools
    SAVE/zero_to_fp32.py                 DeepSpeed's script that turns a checkpoint into fp32 weights
    SAVE/global_step200/                 DeepSpeed's files
    SAVE/global_step200/rank_0.pt        this rank's place in the data and its random state
    SAVE/global_step200/manifest.json    what belongs to it, and to which run

A checkpoint is written in SAVE/.global_step200.partial and renamed once every rank has finished, so that a kill or a
full disk at any moment leaves the previous one as it was. SAVE must be one directory for all ranks.
"""

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
    """How far a run is: optimizer steps, tokens seen by all ranks, seconds spent on training steps."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was saved after, read off its name; raises CheckpointError for any other name."""
    match = TAG.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: its name is not global_step followed by a number")
    return int(match[1])


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    complete = [path for path in directory.iterdir() if TAG.fullmatch(path.name) and (path / FILE).is_file()]
    return sorted(complete, key=step_of)


def find_checkpoint(directory: Path, choice: str) -> Path:
    """The newest checkpoint for an empty `choice`, else the tag in `directory` or the path that it names.

    Raises CheckpointError where there is none, and where `directory` holds newer ones than the one named: the run would
    have to overwrite them.
    """
    complete = list_checkpoints(directory)
    if not choice:
        if not complete:
            raise CheckpointError(
                f"nothing to resume: {directory} holds no complete checkpoint; leave --resume out to start"
            )
        return complete[-1]
    chosen = directory / choice if (directory / choice).is_dir() else Path(choice)
    if not chosen.is_dir():
        raise CheckpointError(f"no checkpoint {choice!r}: it is neither a tag in {directory} nor a path")
    newer = [path.name for path in complete if step_of(path) > step_of(chosen)]
    if newer:
        raise CheckpointError(
            f"{directory} holds checkpoints newer than {chosen.name} ({', '.join(newer)}); to branch off there, "
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
    """Save the engine and each rank's `rank_state` after step `progress.step`; keep the `keep` newest checkpoints.

    `rank_state` must be loadable with `weights_only=True`. Collective. An error on any rank is raised on all of them as
    a CheckpointError, and then `directory` is as it was before.
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
    """Load what `save_checkpoint` wrote into a fresh engine; returns the progress and this rank's state. Collective."""
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
        raise CheckpointError(f"{directory / tag} exists already and is not overwritten; give another --save")
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
        removed = old.rename(directory / f".{old.name}.removed")  # first, so that a kill leaves no half of a checkpoint
        shutil.rmtree(removed)
