"""Cached files that are built once and read by every later run. A reader never sees a half-written or damaged one.

Next to every file ``F`` there is ``F.sha256``, the hash of its bytes. Both are written to a temporary folder and then
renamed, ``F`` first: an interrupted build leaves an ``F`` without its hash, which counts as damaged. Within a job, one
process builds for all nodes that see the same folder. Jobs that build the same file concurrently write the same bytes,
and the last rename wins. They do not wait for each other.

The temporary folder of a process that was killed is removed by the next one. Each contains a lock that its builder
holds, and that the system releases when the builder ends in any way.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ds_lowrank.collectives import all_gather_object, global_rank, is_local_rank0, raise_on_all_ranks
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.files import content_hash

logger = logging.getLogger("ds_lowrank")

PREFIX, LOCK = ".building-", "ds_lowrank.lock"
MARK = ".node-"
LATE_SECONDS = 60.0
FULL = (errno.ENOSPC, errno.EDQUOT)


def ensure_built(path: Path, write: Callable[[Path], None]) -> None:
    """Make sure that there is an intact file at ``path``, building it if it is missing or damaged.

    Args:
        path: the cached file.
        write: writes the file to the path it is called with; must write the same bytes in every process.

    Raises:
        DataError: the folder cannot be written.
    """
    _remove_abandoned(path.parent)
    if _is_intact(path):
        return
    if path.exists():
        logger.warning("%s is damaged or was not finished: building it again", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _building_folder(path.parent) as folder:
            aside = Path(folder, path.name)
            write(aside)
            _flush_to_disk(aside)
            checksum = Path(folder, "sha256")
            checksum.write_text(content_hash(aside))
            os.replace(aside, path)
            os.replace(checksum, _checksum_path(path))
    except OSError as error:
        advice = "free space, or " if error.errno in FULL else ""
        raise DataError(
            f"cannot write {path} ({error.strerror or error}); {advice}give another cache folder as --cache"
        ) from error


def ensure_built_on_nodes(path: Path, write: Callable[[Path], None]) -> None:
    """Call :func:`ensure_built` once for every folder of this name while the other ranks wait. Collective.

    Nodes may share the folder, or have one each. One process builds in each.

    The wait counts towards the time limit of collectives: build data that take longer by a short run on one process
    first, or give a longer ``--setup-timeout``.

    Args:
        path: the cached file.
        write: writes the file to the path it is called with; must write the same bytes in every process.

    Raises:
        DataError: on this rank, the folder cannot be written, or nothing was built on this node.
        RemoteError: another rank failed.
    """
    builds = _is_first_in(path.parent)
    with raise_on_all_ranks():
        if builds:
            ensure_built(path, write)
    with raise_on_all_ranks():
        if not builds and not _comes(lambda: _is_intact(path) if is_local_rank0() else path.exists()):
            raise DataError(f"{path} is not there: no process with LOCAL_RANK 0 on this node has built it")


def _is_first_in(folder: Path) -> bool:
    """Whether this process is the first in a folder: of those that see it, it builds. Collective.

    One process of each node puts a file there. A network file system shows a file of a new name at once. Should it not,
    several nodes build the same.
    """
    mine = folder / f"{MARK}{uuid.uuid4().hex}"
    if is_local_rank0():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()
        except OSError:
            pass  # if the file is not there yet, building it will raise
    names = all_gather_object(mine.name if is_local_rank0() else None)
    earlier = [name for name in names[: global_rank()] if name is not None]
    first = is_local_rank0() and not any((folder / name).exists() for name in earlier)
    all_gather_object(None)  # all have looked
    with suppress(OSError):
        mine.unlink(missing_ok=True)
    return first


def _comes(is_there: Callable[[], bool]) -> bool:
    """Wait for a file that another process has written: a network file system may show it late."""
    end = time.monotonic() + LATE_SECONDS
    while not is_there():
        if time.monotonic() > end:
            return False
        time.sleep(LATE_SECONDS / 60)
    return True


@contextmanager
def _building_folder(parent: Path) -> Iterator[Path]:
    """A new folder that is removed at the end, and that others take for abandoned once this process has ended."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (folder / "new").open("w") as lock:
            _lock(lock)
            (folder / "new").rename(folder / LOCK)  # where it is looked for only now that it is locked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for lock in sorted(parent.glob(f"{PREFIX}*/{LOCK}")):
        try:
            with lock.open("r+") as file:
                if _lock(file):
                    shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # another process has removed it, or owns it
            continue


def _lock(file: IO[str]) -> bool:
    """Lock a file without waiting; False if another process holds it, or if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_intact(path: Path) -> bool:
    checksum = _checksum_path(path)
    return os.path.isfile(path) and os.path.isfile(checksum) and checksum.read_bytes() == content_hash(path).encode()


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
