"""Which rows of a tall tensor travel between which ranks: for one matrix, for a stack, and for a sum of few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ds_lowrank.sharding.layout import Spans, length

Rows = NDArray[np.int64]
"""Positions of rows in a tensor."""
NO_ROWS: Rows = np.empty(0, dtype=np.int64)


class Route:
    """Which rows of a tall tensor each rank has and which it wants.

    Args:
        have: spans of row numbers of the whole tensor by rank; ranks without rows may be missing. A rank's value has
            these rows consecutively.
        want: the spans of each rank's answer.
    """

    def __init__(self, have: Mapping[int, Spans], want: Mapping[int, Spans]) -> None:
        self.have = {rank: spans for rank, spans in have.items() if spans}
        self.want = {rank: spans for rank, spans in want.items() if spans}
        self._sides: dict[int, Side] = {}

    def side(self, rank: int) -> Side:
        """What one rank sends, receives and keeps; found once.

        Args:
            rank: the rank.
        """
        if rank not in self._sides:
            self._sides[rank] = Side(self, rank)
        return self._sides[rank]


class Side:
    """One rank's side of a route.

    Args:
        route: the route.
        rank: the rank.

    Attributes:
        have: number of rows that the rank has.
        want: number of rows that it wants.
        sends: for each other rank that wants some of this rank's rows, their positions in this rank's value.
        receives: for each rank that has wanted rows, this rank included, their positions in this rank's answer.
        keeps: positions in this rank's value of the rows that it receives from itself.
        is_identity: whether the answer is the value: this rank wants what it has, and no other rank adds to it.
    """

    def __init__(self, route: Route, rank: int) -> None:
        own, wanted = route.have.get(rank, ()), route.want.get(rank, ())
        self.have, self.want = length(own), length(wanted)
        self.sends = {}
        for peer, spans in route.want.items() if own else ():
            rows, _ = _common(own, spans)
            if peer != rank and len(rows):
                self.sends[peer] = rows
        self.receives, self.keeps = {}, NO_ROWS
        for peer, spans in route.have.items() if wanted else ():
            source, target = _common(spans, wanted)
            if len(target):
                self.receives[peer] = target
                self.keeps = source if peer == rank else self.keeps
        self.is_identity = own == wanted and all(peer == rank for peer in self.receives)


class StackRoute:
    """The routes of one tensor of every matrix in a stack: the same for all, or one for the matrices of each root.

    Args:
        routes: the distinct routes, each with the positions of its matrices in the stack.
        count: how many matrices the stack has.
        whole_rows: for an answer that only roots want, how many rows it has; None if every rank wants rows.
    """

    def __init__(
        self, routes: Sequence[tuple[Route, Sequence[int]]], count: int, whole_rows: int | None = None
    ) -> None:
        self.routes = [(route, np.asarray(positions, dtype=np.int64)) for route, positions in routes]
        self.count, self._whole_rows = count, whole_rows

    def starts(self, rank: int) -> tuple[Rows, Rows]:
        """Where each matrix's rows begin in a rank's value and in its answer, in rows.

        Args:
            rank: the rank.
        """
        sizes = np.zeros((2, self.count), dtype=np.int64)
        for route, positions in self.routes:
            side = route.side(rank)
            sizes[0, positions], sizes[1, positions] = side.have, side.want
        have, want = sizes.cumsum(axis=1) - sizes
        return have, want

    def answer_shape(self, rank: int, columns: int) -> tuple[int, int, int]:
        """The shape of a rank's answer: matrices x rows x columns.

        Args:
            rank: the rank.
            columns: of the tensor.
        """
        sides = [(route.side(rank), len(positions)) for route, positions in self.routes]
        if self._whole_rows is not None:
            return sum(count for side, count in sides if side.want), self._whole_rows, columns
        return self.count, sides[0][0].want, columns

    def is_identity(self, rank: int) -> bool:
        """Whether a rank's answer is its value."""
        return all(route.side(rank).is_identity for route, _ in self.routes)

    def is_silent(self, rank: int) -> bool:
        """Whether a rank sends none of its rows to another."""
        return not any(route.side(rank).sends for route, _ in self.routes)


class SumRoute:
    """A sum of a few numbers of every matrix over the ranks that share it. Each rank gets the same bits.

    The numbers travel in an order that all ranks know, that of the matrices, however a rank has stacked them.

    Args:
        numbers: identifies each matrix on all ranks.
        peers: for each matrix, the ranks that share it.
    """

    def __init__(self, numbers: Sequence[int], peers: Sequence[Sequence[int]]) -> None:
        self.numbers, self.peers = tuple(numbers), tuple(frozenset(one) for one in peers)


@lru_cache(maxsize=256)
def sum_route(numbers: tuple[int, ...], peers: tuple[int, ...]) -> SumRoute:
    """The sum of matrices that have the same peers; the same object for the same matrices, as plans ask for.

    Args:
        numbers: identifies each matrix on all ranks.
        peers: the ranks that share each of them.
    """
    return SumRoute(numbers, [peers] * len(numbers))


def _common(have: Spans, want: Spans) -> tuple[Rows, Rows]:
    """The rows that are in both: their positions among those that one rank has, and those that the other wants."""
    sources, targets = [], []
    source = 0
    for have_start, have_end in have:
        target = 0
        for want_start, want_end in want:
            lo, hi = max(have_start, want_start), min(have_end, want_end)
            if lo < hi:
                sources.append(np.arange(source + lo - have_start, source + hi - have_start, dtype=np.int64))
                targets.append(np.arange(target + lo - want_start, target + hi - want_start, dtype=np.int64))
            target += want_end - want_start
        source += have_end - have_start
    if not sources:
        return NO_ROWS, NO_ROWS
    return np.concatenate(sources), np.concatenate(targets)
