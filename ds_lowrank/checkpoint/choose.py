"""Which checkpoint a run goes on from."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from ds_lowrank.checkpoint.manifest import DamagedError, Manifest, check_files, read_manifest
from ds_lowrank.checkpoint.owned import check_owned
from ds_lowrank.collectives import global_rank, raise_on_all_ranks
from ds_lowrank.errors import CheckpointError

logger = logging.getLogger("ds_lowrank")

TAG = re.compile(r"global_step(0|[1-9][0-9]*)")
LEFTOVER = re.compile(r"\.global_step[0-9]+\.(partial|removed)")


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, taken from its name.

    Raises:
        CheckpointError: the name is not that of a checkpoint.
    """
    match = TAG.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: its name is not global_step followed by a number")
    return int(match[1])


def list_tags(directory: Path) -> list[Path]:
    """Everything in ``directory`` that has a checkpoint's name, whole or not, oldest first.

    Raises:
        OSError: the folder cannot be read.
    """
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if TAG.fullmatch(path.name)), key=step_of)


def check_unused(directory: Path) -> None:
    """Check that a new run may save its checkpoints in ``directory``, which need not exist.

    Raises:
        CheckpointError: it has checkpoints, of whatever run.
        FileExistsError: something is in the way of the checkpoints.
    """
    tags = list_tags(directory)
    if tags:
        raise CheckpointError(
            f"{directory} already has checkpoints ({_names(tags)}); give --resume to continue that run, or another "
            "--save"
        )
    check_leftovers(directory)


def check_leftovers(directory: Path) -> None:
    """Check that what the next save deletes or replaces is of this package.

    Raises:
        FileExistsError: the rest of an interrupted save, or ``latest``, is of another program.
    """
    for leftover in leftovers(directory):
        check_owned(leftover)
    if os.path.lexists(directory / "latest") and not list_tags(directory):
        raise FileExistsError(
            f"{directory / 'latest'} is in the way: it names a checkpoint that is not there, or another program's; "
            "give another --save, or delete that file"
        )


def leftovers(directory: Path) -> list[Path]:
    """What has the name of the rest of an interrupted save."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if LEFTOVER.fullmatch(path.name)]


def find_checkpoint(directory: Path, choice: str) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        directory: where the run saves its checkpoints.
        choice: '' for the newest one in ``directory``; a tag in it; or the path of another run's checkpoint, which
            counts only as long as ``directory`` has none.

    Returns:
        The checkpoint, which may still be damaged; None if ``choice`` is '' and there is none.

    Raises:
        CheckpointError: there is no such checkpoint, or ``directory`` has others that it conflicts with.
    """
    check_leftovers(directory)
    tags = list_tags(directory)
    if not choice:
        return tags[-1] if tags else None
    chosen = directory / choice if (directory / choice).is_dir() else Path(choice)
    if not chosen.is_dir():
        raise CheckpointError(f"no checkpoint {choice!r}: it is neither a tag in {directory} nor a path")
    step = step_of(chosen)
    newer = [path for path in tags if step_of(path) > step]
    if chosen.parent.resolve() == directory.resolve():
        whole = [path for path in newer if not is_damaged(path)]
        if whole:
            raise CheckpointError(
                f"{directory} has checkpoints newer than {chosen.name} ({_names(whole)}); to branch off there, "
                "give another --save and --output"
            )
        return chosen
    if not tags:
        return chosen
    if len(newer) < len(tags):
        raise CheckpointError(
            f"{directory} has checkpoints that did not start from {chosen} ({_names(tags[: -len(newer) or None])}); "
            "give another --save"
        )
    if global_rank() == 0:
        logger.info("%s has checkpoints that started from %s: continuing from the newest", directory, chosen.name)
    return tags[-1]


def check_whole(checkpoint: Path, directory: Path, share: slice = slice(None)) -> Manifest:
    """Check the files of a checkpoint.

    Args:
        checkpoint: the folder of the checkpoint.
        directory: where the run saves its checkpoints, to name one to use instead.
        share: which of the files this rank reads; together, the ranks must read all.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: the checkpoint is damaged or was saved by another version; the message says what to do.
        OSError: a file cannot be read.
    """
    try:
        return _check(checkpoint, share)
    except DamagedError as error:
        older = [path for path in list_tags(directory) if step_of(path) < step_of(checkpoint)]
        whole = next((path for path in reversed(older) if not is_damaged(path)), None)
        advice = "resume from another checkpoint, or start again with another --output and --save"
        if whole is not None:
            advice = f"--resume {whole.name} continues from the newest whole checkpoint"
        raise CheckpointError(f"{error}; {advice}") from None


def _check(checkpoint: Path, share: slice = slice(None)) -> Manifest:
    manifest = read_manifest(checkpoint)
    check_files(checkpoint, manifest, share)
    if manifest.progress.step != step_of(checkpoint):
        raise DamagedError(f"{checkpoint} is damaged: it was saved after step {manifest.progress.step}")
    return manifest


def is_damaged(checkpoint: Path) -> bool:
    """Whether a checkpoint is not whole. This reads all its files. One of another version counts as whole."""
    try:
        _check(checkpoint)
    except (DamagedError, OSError):
        return True
    except CheckpointError:
        pass
    return False


def set_aside_newer(directory: Path, step: int) -> None:
    """Rename what has the name of a checkpoint after ``step``, so that the run can save it again. Collective.

    ``find_checkpoint`` has found that all of it is damaged.

    Args:
        directory: where the run saves its checkpoints.
        step: the step from which the run continues.

    Raises:
        OSError: it cannot be renamed.
        RemoteError: another rank failed.
    """
    with raise_on_all_ranks():
        for path in list_tags(directory) if global_rank() == 0 else ():
            if step_of(path) <= step:
                continue
            number, aside = 1, path.with_name(f"{path.name}.damaged")
            while aside.exists() or aside.is_symlink():
                number += 1
                aside = path.with_name(f"{path.name}.damaged{number}")
            path.rename(aside)
            logger.info("%s is damaged: renamed to %s", path, aside.name)


def _names(paths: list[Path]) -> str:
    shown = [path.name for path in paths[:5]]
    return ", ".join(shown) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
