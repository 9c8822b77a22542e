"""Files that are built once and read by every later run; a reader never meets one that is half-written or damaged.

A file `F` stands beside `F.sha256`, the hash of its bytes. Both are written aside and renamed into place, `F` first:
an interrupted build leaves an `F` without its hash, which counts as damaged. Processes that build the same file at the
same time write the same bytes, and the last rename wins.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ds_lowrank.collectives import is_local_rank0, raise_on_all_ranks
from ds_lowrank.data.errors import DataError
from ds_lowrank.data.files import content_hash

logger = logging.getLogger(__name__)


def ensure_built(path: Path, write: Callable[[Path], None]) -> None:
    """Leave an intact file at `path`: the one there, or the one that `write(temporary path)` makes.

    `write` must make the same bytes in every process. Raises DataError if the folder cannot be written.
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
    """`ensure_built` by one process of each node while the others wait. Collective; an error is raised on every rank.

    The wait counts against the time-out of the process group: data that take longer to build than that are best built
    by a short run on one process first.
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
