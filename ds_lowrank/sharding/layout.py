"""Which part of which logical matrix a rank holds, and which rank owns which rows of the state.

A rank holds a flat interval ``[start, end)`` of a block of a logical ``m x n`` matrix. The block is the whole matrix,
or the rows ``r0..r1`` by columns ``c0..c1`` that tensor parallelism gave the rank. Such an interval is at most three
rectangles: a partial first row, full rows, a partial last row. The rest of the package works in rectangles.

The rows of a state tensor (a basis, the moments) are dealt over the ranks that hold the matrix. Every row has one owner
among the ranks whose elements touch it; each gets a share in proportion to how many elements of the matrix it holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

Range = tuple[int, int]
"""A half-open range of rows, columns or elements: ``(start, end)``."""
Spans = tuple[Range, ...]
"""Disjoint ranges in ascending order."""


@dataclass(frozen=True)
class Rectangle:
    """Rows ``row..row+height`` by columns ``col..col+width`` of a logical matrix, as stored on one rank.

    Attributes:
        row: first row.
        col: first column.
        height: number of rows.
        width: number of columns.
        offset: where the rectangle starts among the elements that the rank holds of the matrix. From there on its
            elements are contiguous and row-major.
    """

    row: int
    col: int
    height: int
    width: int
    offset: int


@dataclass(frozen=True)
class Block:
    """The rows and columns of a logical matrix that tensor parallelism leaves on one rank.

    Attributes:
        rows: ``[first, last)`` rows of the logical matrix.
        cols: ``[first, last)`` columns of the logical matrix.
    """

    rows: Range
    cols: Range

    @property
    def numel(self) -> int:
        """Number of elements in the block."""
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])


class Part(ABC):
    """What one rank holds of one logical matrix: some rectangles of it."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """Number of elements that the rank holds of the matrix."""

    @property
    @abstractmethod
    def rectangles(self) -> tuple[Rectangle, ...]:
        """Rectangles of these elements, in storage order."""

    @abstractmethod
    def flat_interval(self, columns: int) -> Range | None:
        """Express these elements as one interval of the row-major logical matrix.

        Args:
            columns: number of columns of the logical matrix.

        Returns:
            ``(start, end)``; ``(0, 0)`` for no elements; None if the elements are not one interval.
        """

    @cached_property
    def rows(self) -> Range:
        """The range of rows of the logical matrix that these elements touch; ``(0, 0)`` for no elements."""
        return _covered((r.row, r.row + r.height) for r in self.rectangles)

    @cached_property
    def cols(self) -> Range:
        """The smallest range of columns that covers these elements; ``(0, 0)`` for no elements."""
        return _covered((r.col, r.col + r.width) for r in self.rectangles)


@dataclass(frozen=True)
class ContiguousPart(Part):
    """The elements ``[start, end)`` of a row-major block.

    Attributes:
        block: the rows and columns that are stored on the rank.
        start: first element, counted within the block.
        end: one past the last element.

    Raises:
        ValueError: if the interval is not within the block.
    """

    block: Block
    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= self.block.numel:
            raise ValueError(
                f"the interval [{self.start}, {self.end}) is outside a block of {self.block.numel} elements"
            )

    @property
    def numel(self) -> int:
        """Length of the interval."""
        return self.end - self.start

    @cached_property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """The interval as at most three rectangles, in storage order."""
        row0, col0 = self.block.rows[0], self.block.cols[0]
        width = self.block.cols[1] - col0
        found = []
        position = self.start
        while position < self.end:
            row, col = divmod(position, width)
            if col or self.end - position < width:
                height, span = 1, min(width - col, self.end - position)
            else:
                height, span = (self.end - position) // width, width
            found.append(Rectangle(row0 + row, col0 + col, height, span, position - self.start))
            position += height * span
        return tuple(found)

    def flat_interval(self, columns: int) -> Range | None:
        """Shift ``[start, end)`` to the whole matrix, if the block has all its columns or is within one row."""
        (row, last), cols = self.block.rows, self.block.cols
        if not self.numel:
            return (0, 0)
        if cols != (0, columns) and last - row > 1:
            return None
        first = row * columns + cols[0]
        return first + self.start, first + self.end


@dataclass(frozen=True)
class FusedPart(Part):
    """What a rank holds of one of the matrices in a fused weight: several parts, stored consecutively.

    Attributes:
        parts: in storage order.
    """

    parts: tuple[ContiguousPart, ...]

    @property
    def numel(self) -> int:
        """Number of elements in all parts together."""
        return sum(part.numel for part in self.parts)

    @cached_property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """Rectangles of all parts, in storage order."""
        found, before = [], 0
        for part in self.parts:
            found += [replace(rectangle, offset=before + rectangle.offset) for rectangle in part.rectangles]
            before += part.numel
        return tuple(found)

    def flat_interval(self, columns: int) -> Range | None:
        """Join the intervals of the parts, if each begins where the one before ends."""
        intervals = [part.flat_interval(columns) for part in self.parts if part.numel]
        if not intervals:
            return (0, 0)
        if any(a is None or b is None or a[1] != b[0] for a, b in pairwise(intervals)):
            return None
        first, last = intervals[0], intervals[-1]
        return None if first is None or last is None else (first[0], last[1])


EMPTY = ContiguousPart(Block((0, 0), (0, 0)), 0, 0)
"""The part of a rank that holds nothing of the matrix."""


def whole(shape: Sequence[int], start: int = 0, end: int | None = None) -> ContiguousPart:
    """The elements ``[start, end)`` of a matrix that tensor parallelism does not split.

    Args:
        shape: ``(m, n)`` of the matrix.
        start: first element in row-major order.
        end: one past the last element; None for ``m * n``.

    Raises:
        ValueError: if the interval is not within the matrix.
    """
    m, n = shape
    return ContiguousPart(Block((0, m), (0, n)), start, m * n if end is None else end)


def deal(held: Sequence[Range], counts: Sequence[int], block_rows: int = 1) -> tuple[Spans, ...]:
    """Assign one owner to every row that any rank holds.

    Args:
        held: for each rank, the range of rows that its elements touch. Ranges may overlap.
        counts: for each rank, how many elements it holds.
        block_rows: how many consecutive rows, counted from row 0, have one owner.

    Returns:
        For each rank, the spans of rows that it owns; no row is in two of them. Rows that several ranks hold are dealt
        in proportion to the counts. A rank owns only rows that it holds or, with ``block_rows``, rows of blocks that it
        touches.
    """
    if block_rows > 1:
        last = max((hi for _, hi in held), default=0)
        blocks = deal([(lo // block_rows, -(-hi // block_rows)) if lo < hi else (0, 0) for lo, hi in held], counts)
        return tuple(tuple((lo * block_rows, min(hi * block_rows, last)) for lo, hi in spans) for spans in blocks)
    occupied = sorted(span for span in held if span[0] < span[1])
    if all(before[1] <= after[0] for before, after in pairwise(occupied)):
        # No row has two holders, as along single elements: every holder owns what it holds.
        return tuple((span,) if span[0] < span[1] else () for span in held)
    owned: list[list[Range]] = [[] for _ in held]
    for (lo, hi), holders in _segments(held):
        total = sum(counts[i] for i in holders)
        done, position = 0, lo
        for i in holders:
            done += counts[i]
            end = lo + round((hi - lo) * done / total)
            if end > position:
                _append(owned[i], (position, end))
                position = end
    return tuple(tuple(spans) for spans in owned)


def _segments(held: Sequence[Range]) -> Iterator[tuple[Range, list[int]]]:
    """Cut all held rows where a range begins or ends; each segment with the ranks that hold it, in rank order."""
    begin: dict[int, list[int]] = {}
    end: dict[int, list[int]] = {}
    for i, (lo, hi) in enumerate(held):
        if lo < hi:
            begin.setdefault(lo, []).append(i)
            end.setdefault(hi, []).append(i)
    holders: set[int] = set()
    for lo, hi in pairwise(sorted({*begin, *end})):
        holders.update(begin.get(lo, ()))
        holders.difference_update(end.get(lo, ()))
        yield (lo, hi), sorted(holders)


def length(spans: Spans) -> int:
    """Total length of some spans.

    Args:
        spans: the spans, of rows or of elements.
    """
    return sum(hi - lo for lo, hi in spans)


def _covered(ranges: Iterable[Range]) -> Range:
    """The smallest range that covers all of some ranges; ``(0, 0)`` for no ranges."""
    edges = list(ranges)
    return (min(lo for lo, _ in edges), max(hi for _, hi in edges)) if edges else (0, 0)


def _append(spans: list[Range], new: Range) -> None:
    """Add a range to some spans, merging it with the last one if they are adjacent."""
    if spans and spans[-1][1] == new[0]:
        spans[-1] = (spans[-1][0], new[1])
    else:
        spans.append(new)
