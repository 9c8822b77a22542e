"""An optimizer's state as pieces of logical tensors, to be saved and loaded on any grid.

Every row of a basis and of a moment has one owner, which has it under the matrix's name. A tensor ``key`` of a state is
the logical tensor ``NAME/key``; in 8 and in 4 bits there is also ``NAME/key_scale``, with a row for every block of
rows. The moments of single elements have the shape of the matrix itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_lowrank.linalg.quantization import FP32
from ds_lowrank.methods.blocks.state_spec import Formats, TensorSpec, rounding_offsets
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.layout import Block, ContiguousPart, Rectangle, Spans, length, whole
from ds_lowrank.sharding.pieces import Piece, Source, as_matrix, is_row_major, of_elements, of_rows

CHUNK_ELEMENTS = 2**22
"""Elements that are decoded at a time while a state of other formats is loaded."""


@dataclass(frozen=True)
class _Place:
    """Where this rank's rows of a state tensor are in the logical tensor.

    Attributes:
        shape: of the logical tensor.
        rectangles: of it, in the order of this rank's rows.
        is_logical: whether rows are counted alike on every grid, so that blocks of them are the same.
        spans: of rows, as they are counted here.
    """

    shape: tuple[int, ...]
    rectangles: tuple[Rectangle, ...]
    is_logical: bool
    spans: Spans


def state_pieces(slots: Sequence[Slot]) -> Iterator[Piece]:
    """This rank's pieces of the state of all matrices and vectors; their tensors are the state itself.

    Args:
        slots: of one optimizer.
    """
    for slot in slots:
        if not slot.geometry.part.numel:
            continue
        for key, spec in slot.state_store.tensor_specs(slot.state_store.rank_of(slot.state)).items():
            place, name = _place(slot, spec), f"{slot.tag.name}/{key}"
            stored = {suffix: slot.state[key + suffix] for suffix in spec.tensors}
            if spec.quantizer.block_rows > 1 and not place.is_logical:
                # Its blocks are those of this grid alone: the numbers are saved as they are.
                stored = {"": spec.decode({suffix: one[None] for suffix, one in stored.items()})[0]}
            for suffix, tensor in stored.items():
                shape, rectangles = _of_suffix(spec, suffix, place)
                if rectangles:
                    yield Piece(name + suffix, shape, rectangles, tensor)


def needed_tensors(slot: Slot, rank: int, source: Source, saved_as: Formats) -> dict[str, tuple[int, ...]]:
    """The logical tensors that a slot's state is loaded from, and their shapes.

    Args:
        slot: any.
        rank: the saved rank of the matrix.
        source: what was saved.
        saved_as: the formats of the run that saved it.
    """
    if not slot.geometry.part.numel:
        return {}
    found = {}
    for key, spec in slot.state_store.tensor_specs(rank, saved_as).items():
        name, place = f"{slot.tag.name}/{key}", _place(slot, spec)
        found[name] = _of_suffix(spec, "", place)[0] if source.has(f"{name}_scale") else place.shape
    return found


def load_rows(
    slots: Sequence[Slot], source: Source, values: Mapping[str, Mapping[str, Any]], saved_as: Formats
) -> None:
    """Load the states of some matrices and vectors, cut as this rank has them.

    Args:
        slots: of one group; their states are changed, where the ranks are the same in place.
        source: what was saved.
        values: the states' plain values, of all matrices.
        saved_as: the formats of the run that saved it; the numbers are converted to those of the slots.
    """
    for slot in slots:
        slot.state.update(values[slot.tag.name])
        store = slot.state_store
        rank = store.rank_of(slot.state)
        device = slot.fragment.store.device
        for key, (shape, dtype) in store.tensors(rank).items():
            if tuple(slot.state[key].shape) != shape:
                slot.state[key] = torch.zeros(shape, dtype=dtype, device=device)
        saved_specs = store.tensor_specs(rank, saved_as)
        for key, spec in store.tensor_specs(rank).items():
            if spec.axis.owned:
                _load(slot, key, spec, saved_specs[key], source)


def _load(slot: Slot, key: str, spec: TensorSpec, saved: TensorSpec, source: Source) -> None:
    """Load one tensor of a state."""
    name, place = f"{slot.tag.name}/{key}", _place(slot, spec)
    is_coded = source.has(f"{name}_scale")
    own = {suffix: slot.state[key + suffix] for suffix in spec.tensors}
    if place.is_logical and is_coded and spec.quantizer == saved.quantizer:
        for suffix, tensor in own.items():
            source.read(name + suffix, _of_suffix(spec, suffix, place)[1], tensor)
        return
    if not is_coded and source.dtype(name) == own[""].dtype:
        source.read(name, place.rectangles, own[""])
        return
    shape, device = (spec.axis.owned_rows, spec.columns), own[""].device
    numbers = own[""] if spec.quantizer is FP32 else torch.empty(shape, dtype=torch.float32, device=device)
    if is_coded:
        _read_decoded(source, name, saved, place, numbers)
    else:
        source.read(name, place.rectangles, numbers)
    if spec.quantizer is not FP32:
        offset = rounding_offsets([slot.tag.name], key, slot.state["step"], numbers.device)
        spec.encode(numbers[None], offset, {suffix: tensor[None] for suffix, tensor in own.items()})


def _read_decoded(source: Source, name: str, saved: TensorSpec, place: _Place, out: torch.Tensor) -> None:
    """Read what was saved in blocks as numbers.

    Args:
        source: what was saved.
        name: of the tensor.
        saved: how it was saved.
        place: which elements are read.
        out: where to put them, owned rows x columns, fp32.
    """
    rows, columns = as_matrix(source.shape(name))
    if saved.columns == 1 and columns > 1:  # single elements of a matrix: a block is 64 of them, in its order
        for r in place.rectangles:
            values = out.view(-1)[r.offset : r.offset + r.height * r.width].view(r.height, r.width)
            step = max(1, CHUNK_ELEMENTS // columns)
            for row in range(0, r.height, step):
                part = values[row : row + step]
                lo = (r.row + row) * columns + (r.col if r.height == 1 else 0)
                hi = lo + r.width if r.height == 1 else lo + len(part) * columns
                found = _decoded(source, name, saved, (rows, columns), (lo, hi))
                part.copy_(
                    found.view(len(part), -1)[:, : r.width] if r.height == 1 else _columns(found, part, r, columns)
                )
        return
    for r in place.rectangles:
        step = max(1, CHUNK_ELEMENTS // columns)
        values = out.view(-1)[r.offset : r.offset + r.height * r.width].view(r.height, r.width)
        for row in range(0, r.height, step):
            part = values[row : row + step]
            part.copy_(_decoded(source, name, saved, None, (r.row + row, r.row + row + len(part))))


def _columns(found: torch.Tensor, part: torch.Tensor, rectangle: Rectangle, columns: int) -> torch.Tensor:
    return found.view(len(part), columns)[:, rectangle.col : rectangle.col + rectangle.width]


def _decoded(
    source: Source, name: str, saved: TensorSpec, elements_of: tuple[int, int] | None, rows: tuple[int, int]
) -> torch.Tensor:
    """Some rows of what was saved in blocks: rows x columns, fp32.

    Args:
        source: what was saved.
        name: of the tensor.
        saved: how it was saved.
        elements_of: the matrix whose single elements the rows are; None for rows of the tensor itself.
        rows: ``[first, last)``.
    """
    block = saved.quantizer.block_rows
    size = saved.axis.size
    lo, hi = rows[0] // block * block, min(-(-rows[1] // block) * block, size)
    stored = {}
    for suffix, (shape, dtype) in saved.quantizer.tensors(hi - lo, saved.columns).items():
        span = saved.quantizer.stored_rows(suffix, (lo, hi))
        found = torch.empty(shape, dtype=dtype, device="cpu")
        is_elements = elements_of is not None and suffix == ""
        rectangles = whole(elements_of, *span).rectangles if elements_of and is_elements else of_rows((span,), shape[1])
        source.read(name + suffix, rectangles, found)
        stored[suffix] = found[None]
    return saved.decode(stored)[0, rows[0] - lo : rows[1] - lo]


def _of_suffix(spec: TensorSpec, suffix: str, place: _Place) -> tuple[tuple[int, ...], tuple[Rectangle, ...]]:
    """Shape and rectangles of one of the tensors that are stored for a spec."""
    columns = spec.quantizer.tensors(1, spec.columns)[suffix][0][1]
    if not suffix and columns == spec.columns:
        return place.shape, place.rectangles
    spans = tuple(spec.quantizer.stored_rows(suffix, span) for span in place.spans)
    rows = spec.quantizer.stored_rows(suffix, (0, spec.axis.size))[1]
    return (rows, columns), of_rows(spans, columns)


def _place(slot: Slot, spec: TensorSpec) -> _Place:
    axis, geometry = spec.axis, slot.geometry
    if axis.layout is not geometry.elements:
        return _Place((axis.size, spec.columns), of_rows(axis.owned, spec.columns), True, axis.owned)
    if not slot.is_projected:
        return _Place(slot.whole.shape, of_elements(slot.whole, axis.owned), is_row_major(slot.whole), axis.owned)
    m, n = geometry.shape
    if all(geometry.parts[holder].flat_interval(n) is not None for holder in geometry.holders):
        return _Place((m, n), _flat(geometry.shape, axis.owned), True, axis.owned)
    return _Place((m, n), _rank_by_rank(geometry, axis.owned), False, axis.owned)


def _flat(shape: tuple[int, int], spans: Spans) -> tuple[Rectangle, ...]:
    """Ranges of a row-major matrix as rectangles."""
    found: list[Rectangle] = []
    for position, span in zip(_starts(spans), spans, strict=True):
        found += [
            Rectangle(r.row, r.col, r.height, r.width, position + r.offset) for r in whole(shape, *span).rectangles
        ]
    return tuple(found)


def _rank_by_rank(geometry: Geometry, spans: Spans) -> tuple[Rectangle, ...]:
    """Ranges of a matrix's elements as rectangles, where they are numbered rank by rank in storage order."""
    found: list[Rectangle] = []
    for position, (lo, hi) in zip(_starts(spans), spans, strict=True):
        first = 0
        for holder in geometry.holders:
            for r in geometry.parts[holder].rectangles:
                start = first + r.offset
                a, b = max(lo, start), min(hi, start + r.height * r.width)
                if a < b:
                    block = Block((r.row, r.row + r.height), (r.col, r.col + r.width))
                    for part in ContiguousPart(block, a - start, b - start).rectangles:
                        offset = position + a - lo + part.offset
                        found.append(Rectangle(part.row, part.col, part.height, part.width, offset))
            first += geometry.parts[holder].numel
    return tuple(found)


def _starts(spans: Spans) -> list[int]:
    """How many elements are before each of some spans."""
    return [length(spans[:number]) for number in range(len(spans))]
