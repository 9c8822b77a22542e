"""The folders of checkpoints: a folder with a checkpoint's name is always complete.

A checkpoint TAG is written to SAVE/.TAG.partial and renamed once every rank has finished. A kill or a full disk
therefore never damages an earlier checkpoint. SAVE must be the same folder for all ranks. The functions here are for
rank 0.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_lowrank.checkpoint.choose import leftovers, list_tags
from ds_lowrank.checkpoint.disk import flush, is_full
from ds_lowrank.checkpoint.manifest import (
    FILE,
    Manifest,
    Progress,
    Sealed,
    check_files,
    read_manifest,
    seal,
    write_manifest,
)
from ds_lowrank.checkpoint.owned import MARK, delete_owned, make_owned, mark
from ds_lowrank.collectives import global_rank, is_distributed, raise_on_all_ranks
from ds_lowrank.errors import CheckpointError

logger = logging.getLogger("ds_lowrank")

LATE_SECONDS = 30.0
"""How long rank 0 waits until it sees the files of other nodes, of which NFS keeps what it knows for a while."""

_deleting: list[threading.Thread] = []


def on_first_rank(act: Callable[[], None]) -> None:
    """Do something on rank 0; an error there is raised on all ranks. Collective.

    Args:
        act: called on rank 0.
    """
    with raise_on_all_ranks():
        if global_rank() == 0:
            act()


def partial_of(directory: Path, tag: str) -> Path:
    """Where a checkpoint is written before it has its name.

    Args:
        directory: where checkpoints are saved.
        tag: the checkpoint's name.
    """
    return directory / f".{tag}.partial"


def prepare(directory: Path, tag: str, *, replaces: bool = False) -> None:
    """Make the folder that a checkpoint is written to, and delete what interrupted saves have left.

    Args:
        directory: where checkpoints are saved.
        tag: the checkpoint's name.
        replaces: whether an earlier checkpoint of this name is replaced.

    Raises:
        CheckpointError: there is something of this name that is not replaced.
        OSError: the folder cannot be made.
    """
    while _deleting:
        _deleting.pop().join()
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in leftovers(directory):
        delete_owned(leftover)
    if (directory / tag).exists() and not (replaces and _is_only_ours(directory / tag)):
        raise CheckpointError(
            f"{directory / tag} already exists"
            + (", with files that were not saved with it," if replaces else "")
            + " and is not overwritten; give another "
            + ("tag" if replaces else "--save")
        )
    partial = partial_of(directory, tag)
    delete_owned(partial)
    make_owned(partial)
    (partial / tag).mkdir()


def complete(
    directory: Path,
    tag: str,
    run: Mapping[str, Any],
    progress: Progress,
    written: Mapping[str, Sealed | None],
    wanted: Iterable[str],
    *,
    is_latest: bool = True,
) -> None:
    """Write the manifest and give the checkpoint its name. Everything is on the disk before it has one.

    Args:
        directory: where checkpoints are saved.
        tag: the checkpoint's name.
        run: what identifies the run.
        progress: how far it is.
        written: what the ranks have written: None for a file that several of them wrote.
        wanted: files that must be there.
        is_latest: whether ``latest`` names this checkpoint from now on.

    Raises:
        CheckpointError: a file is missing.
        OSError: something cannot be written.
    """
    partial = partial_of(directory, tag)
    checkpoint = partial / tag
    _wait_for_files(checkpoint, wanted, written)
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint).as_posix()
        files[name] = written.get(name) or seal(path)
    write_manifest(checkpoint, run, progress, files)
    flush(checkpoint)
    for script in partial.glob("*.py"):
        script.replace(directory / script.name)
    if is_latest:
        (partial / "latest").write_text(tag)
        flush(partial / "latest")
    replaced = directory / f".{tag}.removed"
    if (directory / tag).exists():
        mark(directory / tag)
        (directory / tag).rename(replaced)
    checkpoint.rename(directory / tag)
    if is_latest:
        (partial / "latest").replace(directory / "latest")
    flush(directory)
    delete_owned(replaced)
    delete_owned(partial)


def _wait_for_files(checkpoint: Path, wanted: Iterable[str], written: Mapping[str, Sealed | None]) -> None:
    """Wait until the files of all ranks are seen here: a network file system may show them late.

    Raises:
        CheckpointError: one is not, or is not as long as its rank says.
    """

    def is_seen(name: str) -> bool:
        sealed = written.get(name)
        try:
            size = (checkpoint / name).stat().st_size
        except FileNotFoundError:
            return False
        return sealed is None or size == sealed.bytes

    end = time.monotonic() + LATE_SECONDS
    while late := [name for name in wanted if not is_seen(name)]:
        if time.monotonic() > end:
            raise CheckpointError(
                f"{late[0]} is not there, or shorter than its rank wrote it, {LATE_SECONDS:g} s later: the ranks must "
                f"have one folder for checkpoints, {checkpoint.parent.parent} on a file system that they share"
            )
        os.listdir(checkpoint)  # so that NFS asks the server again
        time.sleep(0.05)


def merged(parts: Iterable[Mapping[str, Sealed]]) -> dict[str, Sealed | None]:
    """What the ranks wrote together; None for a file that several of them wrote.

    Args:
        parts: what each of them wrote.
    """
    files: dict[str, Sealed | None] = {}
    for part in parts:
        for name, sealed in part.items():
            files[name] = None if name in files else sealed
    return files


def prune(directory: Path, keep: int, *, in_background: bool = False) -> None:
    """Delete all but the newest whole checkpoints, except those to which somebody else has added a file.

    Args:
        directory: where checkpoints are saved.
        keep: how many remain.
        in_background: whether a thread deletes them, which takes some tenths of a second per GB. They have lost their
            names at once. The next :func:`prepare` waits for it, as the end of the process does.

    Raises:
        OSError: one cannot be deleted.
    """
    for old in list_checkpoints(directory)[:-keep]:
        if not _is_only_ours(old):
            continue
        mark(old)
        removed = old.rename(directory / f".{old.name}.removed")  # first, so that a kill never leaves half a checkpoint
        if in_background:
            _deleting.append(threading.Thread(target=_delete, args=(removed,), name="delete checkpoint"))
            _deleting[-1].start()
        else:
            delete_owned(removed)


def _delete(folder: Path) -> None:
    """Delete a folder; what cannot be deleted now is left to the next save, which says so."""
    try:
        delete_owned(folder)
    except OSError as error:
        logger.warning("%s was not deleted: %s", folder, error)


def _is_only_ours(checkpoint: Path) -> bool:
    """Whether a folder has only what was saved in it."""
    try:
        known = read_manifest(checkpoint).files.keys() | {FILE, MARK}
    except CheckpointError:
        return False
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()}
    return not checkpoint.is_symlink() and not present - known


def share_of_files() -> slice:
    """The share of a checkpoint's files that this rank checks. All ranks together check all of them."""
    return slice(dist.get_rank(), None, dist.get_world_size()) if is_distributed() else slice(None)


def check_files_together(checkpoint: Path) -> Manifest:
    """Check the files of a checkpoint, each of them on one rank. Collective.

    Args:
        checkpoint: its folder.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: it is damaged, or was saved by another version.
        RemoteError: another rank found so.
    """
    with raise_on_all_ranks():
        manifest = read_manifest(checkpoint)
        check_files(checkpoint, manifest, share_of_files())
    return manifest


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in ``directory``, oldest first; their files are not read."""
    return [path for path in list_tags(directory) if (path / FILE).is_file()]


def advice(error: Exception) -> str:
    """What to do where a disk is full, and what may be the reason where torch does not say why it could not write.

    Args:
        error: of a save.
    """
    text = str(error)
    if is_full(error):
        return "; make room on the disk"
    return "; is the disk full?" if "PytorchStreamWriter" in text or "file write failed" in text else ""
