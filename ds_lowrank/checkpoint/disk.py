"""Files on disk: their checksums, and flushing them so that they survive a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: Exception) -> bool:
    """Whether an error says that a disk is full; libraries raise other types than ``OSError``, with its text."""
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def is_of_a_write(error: Exception) -> bool:
    """Whether an error is about writing a file: ``OSError``, or what safetensors and tokenizers raise in its place."""
    return isinstance(error, OSError | SafetensorError) or is_full(error)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk and not only in memory.

    Raises:
        OSError: they could not be written. A disk may report so only now.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; they store names at once.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush everything in a folder, then the folder itself.

    Raises:
        OSError: something could not be written.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flush(path)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            flush(path)
    flush(folder)
