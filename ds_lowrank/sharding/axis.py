"""One dimension of a logical matrix, and how the rows of a state tensor along it travel between ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_lowrank.sharding.layout import Range, Spans, deal, length
from ds_lowrank.sharding.reduce import Request, Route


class Axis:
    """The rows of a tall tensor (a basis, a projection) along one dimension of a matrix, and how they travel.

    Args:
        size: the length of the dimension.
        held: for each rank the range its elements touch.
        weights: for each rank how many elements it holds.
        factor_rank: the rank that factors this matrix.
        rank: this rank.
        run: so many rows have one owner together.
        peers: the ranks that share the tensor; None for all.
    """

    def __init__(
        self,
        size: int,
        held: Sequence[Range],
        weights: Sequence[int],
        factor_rank: int,
        rank: int,
        run: int = 1,
        peers: Sequence[int] | None = None,
    ) -> None:
        self.size, self.rank = size, rank
        self.held = held[rank]
        touched: tuple[Spans, ...] = tuple((span,) if span[0] < span[1] else () for span in held)
        owned = deal(held, weights, run)
        at_factor: tuple[Spans, ...] = tuple(((0, size),) if i == factor_rank else () for i in range(len(held)))
        self.owned = owned[rank]
        self._reduce = Route(touched, owned)
        self._gather = Route(owned, touched)
        sharing = range(len(held)) if peers is None else peers
        everything: tuple[Spans, ...] = tuple(((0, size),) if i in sharing else () for i in range(len(held)))
        self._spread = Route(owned, everything)
        self._collect = Route(owned, at_factor)
        self._sum = Route(touched, at_factor)
        self._hand_out = Route(at_factor, owned)
        self._tell = Route(at_factor, touched)

    @property
    def owned_rows(self) -> int:
        return length(self.owned)

    def own(self, everything: torch.Tensor) -> torch.Tensor:
        """The rows that this rank owns of a tensor that it has whole."""
        return torch.cat([everything[:0], *(everything[lo:hi] for lo, hi in self.owned)])

    def reduce(self, held: torch.Tensor) -> Request:
        """Sum what every rank computed for the rows it holds; the answer is the rows this rank owns."""
        return Request(self._reduce, held)

    def gather(self, owned: torch.Tensor) -> Request:
        """The rows this rank holds, each from its owner."""
        return Request(self._gather, owned)

    def spread(self, owned: torch.Tensor) -> Request:
        """All rows, on every peer."""
        return Request(self._spread, owned)

    def collect(self, owned: torch.Tensor) -> Request:
        """All rows on the factoring rank, none elsewhere."""
        return Request(self._collect, owned)

    def sum_at_factor(self, held: torch.Tensor) -> Request:
        """All rows on the factoring rank, summed over the ranks that hold parts of them; none elsewhere."""
        return Request(self._sum, held)

    def hand_out(self, everything: torch.Tensor) -> Request:
        """The rows this rank owns, from the factoring rank (the others pass a tensor of no rows)."""
        return Request(self._hand_out, everything)

    def tell(self, everything: torch.Tensor) -> Request:
        """The rows this rank holds, from the factoring rank (the others pass a tensor of no rows)."""
        return Request(self._tell, everything)
