"""Reading any elements of the tensors of a checkpoint, whichever files they are in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from ds_lowrank.checkpoint.manifest import DamagedError
from ds_lowrank.checkpoint.tensor_file import DTYPES, PLACES
from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.pieces import as_matrix

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
    """Rectangles of a tensor in one of the files."""

    file: int
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
        self._files: list[Any] = []
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
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            metadata = dict(file.metadata() or {})
            places = _ALL_PLACES.validate_python(json.loads(metadata.pop(PLACES, "null")))
            if set(places) != set(file.keys()):
                raise ValueError("its tensors are not those that it lists")
            for key, place in places.items():
                self._add(number, file, key, place)
        except (SafetensorError, ValidationError, ValueError, RecursionError, KeyError) as error:
            first = str(error).strip().splitlines()[0][:200]
            raise DamagedError(f"{self._folder} is damaged: {name} is not a file of tensors: {first}") from None
        self._files.append(file)
        self.metadata.append(metadata)

    def _add(self, number: int, file: Any, key: str, place: _Places) -> None:
        found = file.get_slice(key)
        shape, dtype = tuple(place.shape), TORCH[found.get_dtype()]
        rows, columns = as_matrix(shape)
        rectangles, offset = [], 0
        for row, col, height, width in place.rectangles:
            if row + height > rows or col + width > columns:
                raise ValueError(f"a piece of {key} is outside of it")
            rectangles.append(Rectangle(row, col, height, width, offset))
            offset += height * width
        if found.get_shape() != [offset]:
            raise ValueError(f"{key} has other elements than it lists")
        tensor = self._tensors.setdefault(key, _Tensor(shape, dtype, []))
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(f"{key} is {shape} {dtype} here and {tensor.shape} {tensor.dtype} in another file")
        tensor.chunks.append(_Chunk(number, tuple(rectangles)))

    def _check_whole(self, key: str, tensor: _Tensor) -> None:
        present = sum(r.height * r.width for chunk in tensor.chunks for r in chunk.rectangles)
        if present != math.prod(tensor.shape):
            raise DamagedError(
                f"{self._folder} is damaged: it has {present} of the {math.prod(tensor.shape)} elements of {key}"
            )

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

    def rectangles(self, key: str) -> list[Rectangle]:
        """The pieces that a tensor consists of, of :func:`as_matrix` of its shape.

        Args:
            key: its name.
        """
        return [rectangle for chunk in self._tensors[key].chunks for rectangle in chunk.rectangles]

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
                    found += self._copy(key, chunk.file, saved, wanted, flat)
        if found != sum(r.height * r.width for r in rectangles):
            raise DamagedError(f"{self._folder} is damaged: it lacks elements of {key}, and has others twice")

    def _copy(self, key: str, file: int, saved: Rectangle, wanted: Rectangle, flat: torch.Tensor) -> int:
        """Copy what two rectangles have in common; return how many elements that is."""
        r0, r1 = max(saved.row, wanted.row), min(saved.row + saved.height, wanted.row + wanted.height)
        c0, c1 = max(saved.col, wanted.col), min(saved.col + saved.width, wanted.col + wanted.width)
        if r0 >= r1 or c0 >= c1:
            return 0
        own = flat[wanted.offset : wanted.offset + wanted.height * wanted.width].view(wanted.height, wanted.width)
        own = own[r0 - wanted.row : r1 - wanted.row, c0 - wanted.col : c1 - wanted.col]
        tensor = self._files[file].get_slice(key)
        if r1 - r0 == 1:
            start = saved.offset + (r0 - saved.row) * saved.width + c0 - saved.col
            for first in range(0, c1 - c0, BLOCK_ELEMENTS):
                last = min(first + BLOCK_ELEMENTS, c1 - c0)
                own[0, first:last].copy_(tensor[start + first : start + last])
            return c1 - c0
        step = max(1, BLOCK_ELEMENTS // saved.width)
        for first in range(r0, r1, step):
            last = min(first + step, r1)
            start = saved.offset + (first - saved.row) * saved.width
            rows = tensor[start : start + (last - first) * saved.width].view(last - first, saved.width)
            own[first - r0 : last - r0].copy_(rows[:, c0 - saved.col : c1 - saved.col])
        return (r1 - r0) * (c1 - c0)
