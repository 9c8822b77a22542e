"""Folders that this package wrote and may therefore replace or delete, recognised by a file in them.

A folder is created with the file as its first entry and deleted with it as its last, so that what a kill leaves behind
is recognised too. Nothing else is ever deleted.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ds_lowrank.checkpoint.disk import flush

MARK = ".ds_lowrank"
TEXT = "ds_lowrank wrote this folder, and replaces or deletes it as a whole. Remove this file to keep the folder.\n"


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
    """Rename a finished folder to its place, where an earlier one of this package may be.

    Args:
        aside: the finished folder, flushed to the disk.
        folder: where it belongs, in the same parent folder.

    Raises:
        FileExistsError: what is there was not written by this package.
        OSError: it cannot be renamed or deleted.
    """
    check_owned(folder)
    removed = folder.with_name(f".{folder.name}.removed")
    delete_owned(removed)
    if folder.exists():
        folder.rename(removed)
    aside.rename(folder)
    flush(folder.parent)
    delete_owned(removed)
