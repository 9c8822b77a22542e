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
        counts: for each rank how many elements it holds.
        root: the rank that runs this matrix's factorisations.
        rank: this rank.
        block_rows: so many rows have one owner together.
        peers: the ranks that share the tensor; None for all.
    """

    def __init__(
        self,
        size: int,
        held: Sequence[Range],
        counts: Sequence[int],
        root: int,
        rank: int,
        block_rows: int = 1,
        peers: Sequence[int] | None = None,
    ) -> None:
        self.size, self.rank = size, rank
        self.held = held[rank]
        touched: tuple[Spans, ...] = tuple((span,) if span[0] < span[1] else () for span in held)
        owned = deal(held, counts, block_rows)
        at_root: tuple[Spans, ...] = tuple(((0, size),) if i == root else () for i in range(len(held)))
        self.owned = owned[rank]
        self._reduce_scatter = Route(touched, owned)
        self._all_gather = Route(owned, touched)
        sharing = range(len(held)) if peers is None else peers
        everything: tuple[Spans, ...] = tuple(((0, size),) if i in sharing else () for i in range(len(held)))
        self._all_gather_full = Route(owned, everything)
        self._gather_to_root = Route(owned, at_root)
        self._reduce_to_root = Route(touched, at_root)
        self._scatter_from_root = Route(at_root, owned)
        self._broadcast_from_root = Route(at_root, touched)

    @property
    def owned_rows(self) -> int:
        return length(self.owned)

    def own(self, everything: torch.Tensor) -> torch.Tensor:
        """The rows that this rank owns of a tensor that it has whole."""
        return torch.cat([everything[:0], *(everything[lo:hi] for lo, hi in self.owned)])

    def reduce_scatter(self, held: torch.Tensor) -> Request:
        """Sum what every rank computed for the rows it holds; the answer is the rows this rank owns."""
        return Request(self._reduce_scatter, held)

    def all_gather(self, owned: torch.Tensor) -> Request:
        """The rows this rank holds, each from its owner."""
        return Request(self._all_gather, owned)

    def all_gather_full(self, owned: torch.Tensor) -> Request:
        """All rows, on every peer."""
        return Request(self._all_gather_full, owned)

    def gather_to_root(self, owned: torch.Tensor) -> Request:
        """All rows on the root, none elsewhere."""
        return Request(self._gather_to_root, owned)

    def reduce_to_root(self, held: torch.Tensor) -> Request:
        """All rows on the root, summed over the ranks that hold parts of them; none elsewhere."""
        return Request(self._reduce_to_root, held)

    def scatter_from_root(self, everything: torch.Tensor) -> Request:
        """The rows this rank owns, from the root (the others pass a tensor of no rows)."""
        return Request(self._scatter_from_root, everything)

    def broadcast_from_root(self, everything: torch.Tensor) -> Request:
        """The rows this rank holds, from the root (the others pass a tensor of no rows)."""
        return Request(self._broadcast_from_root, everything)
