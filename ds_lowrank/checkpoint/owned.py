"""Folders that this package wrote and may therefore replace or delete, recognised by a file in them.

A folder is created with the file as its first entry and deleted with it as its last, so that what a kill leaves behind
is recognised too. Nothing else is ever deleted. A finished folder lists its files there: if one has been added,
it is not deleted but renamed.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from ds_lowrank.checkpoint.disk import flush, flush_folder

logger = logging.getLogger("ds_lowrank")

MARK = ".ds_lowrank"
TEXT = "ds_lowrank wrote this folder, and replaces or deletes it as a whole. Remove this file to keep the folder.\n"
LIST = "It consists of:\n"


def mark(folder: Path) -> None:
    """Declare an existing folder to be written by this package."""
    (folder / MARK).write_text(TEXT)


def make_owned(folder: Path) -> None:
    """Create a folder that may be deleted again.

    Raises:
        OSError: it cannot be created, or there is something of this name already.
    """
    folder.mkdir(parents=True)
    mark(folder)


def is_owned(folder: Path) -> bool:
    """Whether a folder was written by this package, or is empty."""
    return folder.is_dir() and not folder.is_symlink() and ((folder / MARK).is_file() or not any(folder.iterdir()))


def working_names(folder: Path) -> list[Path]:
    """The folder and the names beside it that replacing it uses."""
    return [folder, *(folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "removed"))]


def check_owned(folder: Path) -> None:
    """Return if there is nothing of this name, or a folder that may be replaced.

    Raises:
        FileExistsError: it would destroy something that this package did not write.
    """
    if (folder.exists() or folder.is_symlink()) and not is_owned(folder):
        raise FileExistsError(
            f"{folder} is in the way: this program did not write it and does not replace it; move it elsewhere"
        )


def delete_owned(folder: Path) -> None:
    """Delete a folder that this package wrote; nothing happens if there is none.

    Raises:
        FileExistsError: it was not written by this package.
        OSError: it cannot be deleted.
    """
    check_owned(folder)
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def replace_owned(aside: Path, folder: Path) -> None:
    """Flush a finished folder and rename it to its place, where an earlier one of this package may be.

    An earlier one to which somebody has added a file is renamed to FOLDER.1 and so on; others are deleted.

    Args:
        aside: the finished folder.
        folder: where it belongs, in the same parent folder.

    Raises:
        FileExistsError: what is there was not written by this package.
        OSError: it cannot be renamed or deleted.
    """
    check_owned(folder)
    (aside / MARK).write_text(TEXT + LIST + "".join(f"{name}\n" for name in sorted(_files(aside))))
    flush_folder(aside)
    removed = folder.with_name(f".{folder.name}.removed")
    delete_owned(removed)
    if folder.exists() and _is_extended(folder):
        _keep(folder)
    elif folder.exists():
        folder.rename(removed)
    aside.rename(folder)
    flush(folder.parent)
    delete_owned(removed)


def _files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in found} - {MARK}


def _is_extended(folder: Path) -> bool:
    """Whether a finished folder has a file that it did not have when it was finished."""
    if not (folder / MARK).is_file():  # it is empty
        return False
    _, listed, names = (folder / MARK).read_text(errors="replace").partition(LIST)
    return bool(listed) and not _files(folder) <= set(names.splitlines())


def _keep(folder: Path) -> None:
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists() or kept.is_symlink():
        number += 1
    folder.rename(kept)
    (kept / MARK).unlink()
    logger.info("%s has files that this program did not write: renamed to %s", folder, kept.name)
