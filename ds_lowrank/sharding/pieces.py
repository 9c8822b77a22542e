"""What a rank has of logical tensors, as it is saved and loaded: rectangles of rows and columns.

A logical tensor has two dimensions here: a vector is one row, and so is what is neither a matrix nor a vector.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from ds_lowrank.sharding.layout import ContiguousPart, Range, Rectangle, Spans, whole
from ds_lowrank.sharding.logical import Logical


@dataclass(frozen=True)
class Piece:
    """Elements of one logical tensor that a rank has.

    Attributes:
        key: the tensor's name.
        shape: of the whole tensor.
        rectangles: which elements they are, of :func:`as_matrix` of the shape.
        data: the elements of the rectangles one after the other, each row-major; contiguous, any shape and dtype.
    """

    key: str
    shape: tuple[int, ...]
    rectangles: tuple[Rectangle, ...]
    data: torch.Tensor


class Source(Protocol):
    """Logical tensors that were saved, on whatever grid."""

    def has(self, key: str) -> bool:
        """Whether there is such a tensor."""

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    def dtype(self, key: str) -> torch.dtype:
        """In which it was saved."""

    def read(self, key: str, rectangles: Sequence[Rectangle], out: torch.Tensor) -> None:
        """Copy elements of a tensor.

        Args:
            key: its name.
            rectangles: which elements.
            out: where to put them one after the other: contiguous, any shape, dtype and device; converted by rounding
                to nearest.
        """


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a logical tensor.

    Args:
        shape: any.
    """
    return (shape[0], shape[1]) if len(shape) == 2 else (1, math.prod(shape))


def of_rows(spans: Spans, columns: int) -> tuple[Rectangle, ...]:
    """Whole rows as rectangles.

    Args:
        spans: ranges of rows.
        columns: the number of columns.
    """
    lengths = [(hi - lo) * columns for lo, hi in spans]
    starts = [0, *accumulate(lengths)]
    return tuple(
        Rectangle(lo, 0, hi - lo, columns, start) for (lo, hi), start in zip(spans, starts, strict=False) if hi > lo
    )


def of_elements(logical: Logical, spans: Spans) -> tuple[Rectangle, ...]:
    """Elements that are counted as in :meth:`Logical.as_row`, as rectangles of the matrix itself.

    Args:
        logical: the matrix.
        spans: ranges of its elements.
    """
    found: list[Rectangle] = []
    for span in spans:
        for part in _parts(logical, span):
            before = found[-1].offset + found[-1].height * found[-1].width if found else 0
            found += [Rectangle(r.row, r.col, r.height, r.width, before + r.offset) for r in part.rectangles]
    return tuple(found)


def are_disjoint(rectangles: Iterable[Rectangle]) -> bool:
    """Whether no element is in two rectangles; found in ``n log n``, whatever their sizes.

    Args:
        rectangles: of one tensor.
    """
    edges = []
    for r in rectangles:
        if r.height and r.width:
            edges += [(r.row, True, (r.col, r.col + r.width)), (r.row + r.height, False, (r.col, r.col + r.width))]
    open_ones: list[Range] = []  # columns of the rectangles that have the present row, in order
    for _, begins, span in sorted(edges):
        place = bisect_left(open_ones, span)
        if not begins:
            del open_ones[place]
            continue
        if (place and open_ones[place - 1][1] > span[0]) or (place < len(open_ones) and open_ones[place][0] < span[1]):
            return False
        open_ones.insert(place, span)
    return True


def is_row_major(logical: Logical) -> bool:
    """Whether :meth:`Logical.as_row` counts the elements as they lie in the whole matrix, on any grid.

    Args:
        logical: the matrix.
    """
    columns = as_matrix(logical.shape)[1]
    return all(strip.block.cols == (0, columns) for strips in logical.strips for strip in strips) or (
        len(logical.shape) == 1
    )


def _parts(logical: Logical, span: Range) -> Iterable[ContiguousPart]:
    """The parts of the matrix that a range of the elements of its row consists of, in order."""
    if len(logical.shape) != 2 or is_row_major(logical):
        yield whole(as_matrix(logical.shape), *span)
        return
    first = 0
    for strips in logical.strips:  # rank by rank
        for strip in strips:
            lo, hi = max(span[0], first), min(span[1], first + strip.block.numel)
            if lo < hi:
                yield ContiguousPart(strip.block, lo - first, hi - first)
            first += strip.block.numel
