"""Tensors in memory that the system may write to a file: for formats of files that are written as a whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch


def spooled(numel: int, dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """An uninitialized tensor whose memory is a file, which is deleted with it.

    Args:
        numel: how many elements; flat, on the CPU.
        dtype: of the elements.
        folder: on the disk that has room for it.

    Raises:
        OSError: the disk is full.
    """
    if not numel:
        return torch.empty(0, dtype=dtype, device="cpu")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".spool") as file:
        reserve(file.fileno(), numel * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=numel, dtype=dtype, device="cpu")


def reserve(descriptor: int, size: int) -> None:
    """Take room on the disk: writing to memory that has none would kill the process.

    Args:
        descriptor: of a file.
        size: in bytes.

    Raises:
        OSError: there is no room.
    """
    os.posix_fallocate(descriptor, 0, size)
