"""A rank's file of a checkpoint: its pieces of logical tensors, in the safetensors format, with their places.

The safetensors package takes all tensors of a file at once, as bytes in memory. Here they are written one block after
the other, and the checksum is taken beside it, so that nothing is copied or read a second time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ds_lowrank.checkpoint.manifest import Sealed
from ds_lowrank.sharding.pieces import Piece

BLOCK_BYTES = 2**24
"""So much of a tensor is brought to the CPU and written at a time."""
DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How the format names the dtypes."""
PLACES = "pieces"
"""The key of the metadata under which the shape and the rectangles of every piece are."""


def write_pieces(path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str]) -> Sealed:
    """Write a file and flush it to the disk.

    Args:
        path: of the file.
        pieces: of different tensors; on any device.
        metadata: further texts.

    Returns:
        Its size and checksum.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {**metadata, PLACES: json.dumps({p.key: places(p) for p in pieces})}}
    position = 0
    for piece in pieces:
        size = piece.data.numel() * piece.data.element_size()
        header[piece.key] = {
            "dtype": DTYPES[piece.data.dtype],
            "shape": [piece.data.numel()],
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, "checksum") as beside:
        written = 0
        for block in _blocks(text, pieces):
            hashed = beside.submit(digest.update, block)
            try:
                _write(file.fileno(), block)
                _begin_flushing(file.fileno(), written, len(block))
            finally:
                hashed.result()  # the next block may be in the same memory
            written += len(block)
        os.fsync(file.fileno())
    return Sealed(bytes=8 + len(text) + position, sha256=digest.hexdigest())


def places(piece: Piece) -> dict[str, Any]:
    """Where a piece is in its tensor, as JSON has it.

    Args:
        piece: any.
    """
    return {
        "shape": list(piece.shape),
        "rectangles": [[r.row, r.col, r.height, r.width] for r in piece.rectangles],
    }


def _blocks(header: bytes, pieces: Sequence[Piece]) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for piece in pieces:
        flat = piece.data.detach().reshape(-1)
        for block in torch.split(flat, max(1, BLOCK_BYTES // flat.element_size())):
            yield block.cpu().contiguous().view(torch.uint8).numpy().data


def _begin_flushing(descriptor: int, start: int, size: int) -> None:
    """Have the disk write a block while the next ones are made. Linux does so at this advice, and keeps the block."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _write(descriptor: int, block: memoryview) -> None:
    """Write all of a block: one call may write less."""
    while block:
        block = block[os.write(descriptor, block) :]
