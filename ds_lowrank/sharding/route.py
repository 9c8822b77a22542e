"""Which rows of a tall tensor travel between which ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_lowrank.sharding.layout import Spans, length


class Route:
    """Which rows of a tall tensor each rank has and which it wants.

    Args:
        have: for each rank, spans of row numbers of the whole tensor. The rank's value has these rows consecutively.
        want: for each rank, the spans of its answer.

    Raises:
        ValueError: if there are not as many wants as haves.
    """

    def __init__(self, have: Sequence[Spans], want: Sequence[Spans]) -> None:
        if len(have) != len(want):
            raise ValueError(f"a route needs as many wants as haves, got {len(want)} and {len(have)}")
        self.have, self.want = tuple(have), tuple(want)
        self._plans: dict[int, RankRoute] = {}

    def plan(self, rank: int) -> RankRoute:
        """What one rank sends, receives and keeps; computed once.

        Args:
            rank: the rank.
        """
        if rank not in self._plans:
            self._plans[rank] = RankRoute(self, rank)
        return self._plans[rank]


class RankRoute:
    """One rank's side of a route.

    Args:
        route: the route.
        rank: the rank.

    Attributes:
        rows: number of rows that the rank wants.
        sends: for each other rank that wants some of this rank's rows, the moves to it.
        receives: for each rank that has wanted rows, this rank included, the moves from it; in rank order.
        received_rows: number of rows from each of these ranks.
        is_identity: whether the rank keeps exactly what it has and no other rank adds to it.
    """

    def __init__(self, route: Route, rank: int) -> None:
        own, wanted = route.have[rank], route.want[rank]
        self.rows = length(wanted)
        self.sends = {
            peer: moves for peer, want in enumerate(route.want) if peer != rank and (moves := _moves(own, want))
        }
        self.receives = {peer: moves for peer, have in enumerate(route.have) if (moves := _moves(have, wanted))}
        self.received_rows = {peer: sum(move.count for move in moves) for peer, moves in self.receives.items()}
        self.is_identity = own == wanted and all(peer == rank for peer in self.receives)


@dataclass(frozen=True)
class Move:
    """Consecutive rows that one rank sends to another.

    Attributes:
        source: their position in the sender's tensor.
        target: their position in the receiver's answer.
        count: number of rows.
    """

    source: int
    target: int
    count: int


def _moves(have: Spans, want: Spans) -> list[Move]:
    """The rows that are both in what one rank has and in what another one wants."""
    moves, source = [], 0
    for have_start, have_end in have:
        target = 0
        for want_start, want_end in want:
            lo, hi = max(have_start, want_start), min(have_end, want_end)
            if lo < hi:
                moves.append(Move(source=source + lo - have_start, target=target + lo - want_start, count=hi - lo))
            target += want_end - want_start
        source += have_end - have_start
    return moves
