"""Local files: which there are below a folder, what format they have, and the hash of their bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from ds_lowrank.data.errors import DataError
from ds_lowrank.data.text import COMPRESSIONS

RECORD_FORMATS = (".jsonl", ".json", ".parquet")
ROW_FORMATS = (*RECORD_FORMATS, ".csv")


def file_format(path: Path) -> str:
    """The lower-case suffix that names the file's format, without a compression suffix: ``.json`` for ``a.json.gz``."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


def holds_records(path: Path) -> bool:
    """Whether the file is read as records (JSON, JSON Lines or parquet) and not as one text."""
    return file_format(path) in RECORD_FORMATS


def files_below(root: Path, left_out: Callable[[str], bool], suffix: str = "") -> tuple[Path, ...]:
    """Find the files below a folder, sorted by relative path. Links to folders are followed.

    Args:
        root: the folder.
        left_out: whether to skip a file, or a folder with all of its contents, given its name.
        suffix: what the names of the files must end in.

    Raises:
        DataError: there are no such files, a folder cannot be read or is a link to one that it is in, or a file is
            nothing that can be read, such as a broken link.
    """
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse_folder):
        subfolders[:] = [name for name in subfolders if not left_out(name)]
        for path in (Path(folder, name) for name in subfolders):
            if path.is_symlink() and _contains_itself(path):
                raise DataError(f"{path} is a link to a folder that it is in itself: remove it")
        files.extend(Path(folder, name) for name in names if name.endswith(suffix) and not left_out(name))
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is neither a file nor a folder, or a broken link: remove it")
    if not files:
        raise DataError(f"no data files in the folder {root}")
    return tuple(sorted(files, key=lambda path: path.relative_to(root).as_posix()))


def is_hidden(name: str) -> bool:
    """Whether the name of a file or folder starts with a dot; such are not data."""
    return name.startswith(".")


def content_hash(path: Path) -> str:
    """The SHA-256 of the file's bytes, in hex.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _contains_itself(link: Path) -> bool:
    target = link.resolve()
    return any(parent.resolve().is_relative_to(target) for parent in link.parents)


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be read ({error.strerror}): make it readable, or remove it")
