"""Reading any elements of the tensors of a checkpoint, whichever files they are in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from ds_lowrank.checkpoint.manifest import DamagedError
from ds_lowrank.checkpoint.tensor_file import DTYPES, PLACES
from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.pieces import are_disjoint, as_matrix

BLOCK_ELEMENTS = 2**22
"""So many elements are read at a time."""
TORCH = {name: dtype for dtype, name in DTYPES.items()}

_Count = Annotated[int, Field(ge=0, strict=True)]


class _Places(BaseModel):
    model_config = ConfigDict(extra="forbid")

    shape: list[_Count]
    rectangles: list[tuple[_Count, _Count, _Count, _Count]]


_ALL_PLACES = TypeAdapter(dict[str, _Places])


@dataclass(frozen=True)
class _Chunk:
    """Rectangles of a tensor in one of the files, one after the other from a byte of it."""

    file: int
    start: int
    rectangles: tuple[Rectangle, ...]


@dataclass
class _Tensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[_Chunk]


class SavedTensors:
    """The tensors of a checkpoint: a :class:`ds_lowrank.sharding.pieces.Source`.

    Only the files' headers are read when it is made. It is a context, which keeps the files open.

    Args:
        folder: of the checkpoint.
        names: of its files of tensors, in order.

    Attributes:
        metadata: the other texts in each file.

    Raises:
        DamagedError: a header is none, or the pieces do not make up whole tensors.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names
        self._files: list[FileIO] = []
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._tensors: dict[str, _Tensor] = {}
        self.metadata: list[Mapping[str, str]] = []
        self._stack = ExitStack()
        try:
            for number, name in enumerate(names):
                self._open(number, name)
            for key, tensor in self._tensors.items():
                self._check_whole(key, tensor)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> SavedTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self, number: int, name: str) -> None:
        path = self._folder / name
        try:
            with safe_open(path, framework="pt") as checked:  # the format's own checks of the header
                metadata = dict(checked.metadata() or {})
                keys = set(checked.keys())
            file = self._stack.enter_context(path.open("rb", buffering=0))
            first = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(first - 8))
            places = _ALL_PLACES.validate_python(json.loads(metadata.pop(PLACES, "null")))
            if not set(places) == keys == set(header) - {"__metadata__"}:
                raise ValueError("its tensors are not those that it lists")
            for key, place in places.items():
                self._add(number, first, key, place, header[key])
        except (SafetensorError, ValidationError, ValueError, RecursionError, KeyError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise DamagedError(f"{self._folder} is damaged: {name} is not a file of tensors: {reason}") from None
        self._files.append(file)
        self.metadata.append(metadata)

    def _add(self, number: int, first: int, key: str, place: _Places, entry: Mapping[str, Any]) -> None:
        if entry["dtype"] not in TORCH:
            raise ValueError(f"{key} is {entry['dtype']}, which is not saved")
        shape, dtype = tuple(place.shape), TORCH[entry["dtype"]]
        rows, columns = as_matrix(shape)
        rectangles, offset = [], 0
        for row, col, height, width in place.rectangles:
            if row + height > rows or col + width > columns:
                raise ValueError(f"a piece of {key} is outside of it")
            rectangles.append(Rectangle(row, col, height, width, offset))
            offset += height * width
        start, end = entry["data_offsets"]
        if entry["shape"] != [offset] or end - start != offset * dtype.itemsize:
            raise ValueError(f"{key} has other elements than it lists")
        tensor = self._tensors.setdefault(key, _Tensor(shape, dtype, []))
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(f"{key} is {shape} {dtype} here and {tensor.shape} {tensor.dtype} in another file")
        tensor.chunks.append(_Chunk(number, first + start, tuple(rectangles)))

    def _check_whole(self, key: str, tensor: _Tensor) -> None:
        rectangles = [r for chunk in tensor.chunks for r in chunk.rectangles]
        present, total = sum(r.height * r.width for r in rectangles), math.prod(tensor.shape)
        if present != total or not are_disjoint(rectangles):
            found = f"{present} of the {total}" if present != total else "some twice, and not all, of the"
            names = ", ".join(self._names[chunk.file] for chunk in tensor.chunks[:4])
            raise DamagedError(f"{self._folder} is damaged: it has {found} elements of {key} ({names})")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def has(self, key: str) -> bool:
        """Whether there is such a tensor.

        Args:
            key: its name.
        """
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Args:
            key: its name.
        """
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """In which a tensor was saved.

        Args:
            key: its name.
        """
        return self._tensors[key].dtype

    def nbytes(self, key: str) -> int:
        """The bytes of a tensor.

        Args:
            key: its name.
        """
        return math.prod(self.shape(key)) * self.dtype(key).itemsize

    def whole(self, key: str) -> torch.Tensor:
        """A whole tensor, on the CPU, as it was saved.

        Args:
            key: its name.
        """
        out = torch.empty(self.shape(key), dtype=self.dtype(key), device="cpu")
        rows, columns = as_matrix(self.shape(key))
        self.read(key, [Rectangle(0, 0, rows, columns, 0)], out)
        return out

    def read(self, key: str, rectangles: Sequence[Rectangle], out: torch.Tensor) -> None:
        """Copy elements of a tensor, a few million at a time.

        Args:
            key: its name.
            rectangles: which elements.
            out: where to put them one after the other: contiguous, any shape, dtype and device.

        Raises:
            DamagedError: the checkpoint does not have them all.
        """
        flat, found = out.view(-1), 0
        for wanted in rectangles:
            for chunk in self._tensors[key].chunks:
                for saved in chunk.rectangles:
                    found += self._copy(key, chunk, saved, wanted, flat)
        if found != sum(r.height * r.width for r in rectangles):
            raise DamagedError(f"{self._folder} is damaged: it lacks elements of {key}, and has others twice")

    def _copy(self, key: str, chunk: _Chunk, saved: Rectangle, wanted: Rectangle, flat: torch.Tensor) -> int:
        """Copy what two rectangles have in common; return how many elements that is."""
        r0, r1 = max(saved.row, wanted.row), min(saved.row + saved.height, wanted.row + wanted.height)
        c0, c1 = max(saved.col, wanted.col), min(saved.col + saved.width, wanted.col + wanted.width)
        if r0 >= r1 or c0 >= c1:
            return 0
        own = flat[wanted.offset : wanted.offset + wanted.height * wanted.width].view(wanted.height, wanted.width)
        own = own[r0 - wanted.row : r1 - wanted.row, c0 - wanted.col : c1 - wanted.col]
        dtype = self._tensors[key].dtype
        if r1 - r0 == 1:
            start = saved.offset + (r0 - saved.row) * saved.width + c0 - saved.col
            for first in range(0, c1 - c0, BLOCK_ELEMENTS):
                part = own[0, first : first + BLOCK_ELEMENTS]
                self._fill(chunk, start + first, part.view(1, -1), slice(None), part.numel(), dtype)
            return c1 - c0
        step = max(1, BLOCK_ELEMENTS // saved.width)
        columns = slice(c0 - saved.col, c1 - saved.col)
        for first in range(r0, r1, step):
            part = own[first - r0 : first - r0 + step]
            self._fill(chunk, saved.offset + (first - saved.row) * saved.width, part, columns, saved.width, dtype)
        return (r1 - r0) * (c1 - c0)

    def _fill(
        self, chunk: _Chunk, start: int, out: torch.Tensor, columns: slice, width: int, dtype: torch.dtype
    ) -> None:
        """Read the rows of ``out``, of which the file has ``width`` columns: straight into it where they lie alike."""
        position, count = chunk.start + start * dtype.itemsize, len(out) * width
        if out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous() and out.numel() == count:
            self._read_bytes(chunk.file, position, out.detach().view(-1).view(torch.uint8))
            return
        if self._buffer.numel() < count * dtype.itemsize:
            self._buffer = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="cpu")
        found = self._buffer[: count * dtype.itemsize]
        self._read_bytes(chunk.file, position, found)
        out.copy_(found.view(dtype).view(len(out), width)[:, columns])

    def _read_bytes(self, file: int, position: int, out: torch.Tensor) -> None:
        """Fill a flat tensor of bytes: one call may read less, and a file may be cut while it is read."""
        left: memoryview = out.numpy().data
        while left:
            count = os.preadv(self._files[file].fileno(), [left], position)
            if not count:
                raise DamagedError(f"{self._folder} is damaged: {self._names[file]} is shorter than its header says")
            left, position = left[count:], position + count
