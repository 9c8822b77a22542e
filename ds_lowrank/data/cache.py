"""Cached files that are built once and read by every later run. A reader never sees a half-written or damaged one.

Next to every file ``F`` there is ``F.sha256``, the hash of its bytes. Both are written to a temporary folder and then
renamed, ``F`` first: an interrupted build leaves an ``F`` without its hash, which counts as damaged. Processes that
build the same file concurrently write the same bytes, and the last rename wins.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ds_lowrank.collectives import is_local_rank0, raise_on_all_ranks
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.files import content_hash

logger = logging.getLogger("ds_lowrank")


def ensure_built(path: Path, write: Callable[[Path], None]) -> None:
    """Make sure that there is an intact file at ``path``, building it if it is missing or damaged.

    Args:
        path: the cached file.
        write: writes the file to the path it is called with; must write the same bytes in every process.

    Raises:
        DataError: the folder cannot be written.
    """
    if _is_intact(path):
        return
    if path.exists():
        logger.warning("%s is damaged or was not finished: building it again", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as folder:
            aside = Path(folder, path.name)
            write(aside)
            _flush_to_disk(aside)
            checksum = Path(folder, "sha256")
            checksum.write_text(content_hash(aside))
            os.replace(aside, path)
            os.replace(checksum, _checksum_path(path))
    except OSError as error:
        raise DataError(f"cannot write {path} ({error}); free space or give another cache folder") from error


def ensure_built_on_nodes(path: Path, write: Callable[[Path], None]) -> None:
    """Call :func:`ensure_built` in one process of each node while the others wait. Collective.

    The wait counts towards the timeout of the process group: build data that take longer by a short run on one process
    first.

    Args:
        path: the cached file.
        write: writes the file to the path it is called with; must write the same bytes in every process.

    Raises:
        DataError: on this rank, the folder cannot be written, or nothing was built on this node.
        RemoteError: another rank failed.
    """
    with raise_on_all_ranks():
        if is_local_rank0():
            ensure_built(path, write)
    with raise_on_all_ranks():
        if not path.exists():
            raise DataError(f"{path} is not there: no process with LOCAL_RANK 0 on this node has built it")


def _is_intact(path: Path) -> bool:
    checksum = _checksum_path(path)
    return path.is_file() and checksum.is_file() and checksum.read_text() == content_hash(path)


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
