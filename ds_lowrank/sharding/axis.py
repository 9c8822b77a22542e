"""One dimension of a logical matrix, and how the rows of a state tensor along it travel between ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_lowrank.sharding.layout import Range, Spans, deal, length
from ds_lowrank.sharding.reduce import Request
from ds_lowrank.sharding.route import Route


class Axis:
    """The rows of a tall tensor (a basis, a projection) along one dimension of a matrix, and how they travel.

    A rank *holds* the rows that its elements of the matrix touch; it computes with those. It *owns* some of the rows it
    holds and stores state for those. Every row has one owner.

    Args:
        size: length of the dimension.
        held: for each rank, the range of rows that its elements touch; ``(0, 0)`` for none.
        counts: for each rank, how many elements of the matrix it holds.
        root: the rank that runs this matrix's factorizations.
        rank: this rank.
        block_rows: how many consecutive rows, counted from row 0, have one owner.
        peers: the ranks that share the tensor; None for all.

    Attributes:
        held: the range of rows that this rank holds.
        owned: the spans of rows that this rank owns.
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
        at_peers: tuple[Spans, ...] = tuple(((0, size),) if i in sharing else () for i in range(len(held)))
        self._all_gather_full = Route(owned, at_peers)
        self._gather_to_root = Route(owned, at_root)
        self._reduce_to_root = Route(touched, at_root)
        self._scatter_from_root = Route(at_root, owned)
        self._broadcast_from_root = Route(at_root, touched)

    @property
    def owned_rows(self) -> int:
        """Number of rows that this rank owns."""
        return length(self.owned)

    def own(self, all_rows: torch.Tensor) -> torch.Tensor:
        """Select the rows that this rank owns from a tensor of all rows.

        Args:
            all_rows: size x k, any dtype.

        Returns:
            owned rows x k, same dtype.
        """
        return torch.cat([all_rows[:0], *(all_rows[lo:hi] for lo, hi in self.owned)])

    def reduce_scatter(self, held: torch.Tensor) -> Request:
        """Sum over ranks what each computed for the rows it holds.

        Args:
            held: held rows x k: this rank's contribution.

        Returns:
            A request whose answer is the sum of this rank's rows: owned rows x k, fp32.
        """
        return Request(self._reduce_scatter, held)

    def all_gather(self, owned: torch.Tensor) -> Request:
        """Fetch the rows that this rank holds, each from its owner.

        Args:
            owned: owned rows x k.

        Returns:
            A request whose answer is held rows x k, fp32.
        """
        return Request(self._all_gather, owned)

    def all_gather_full(self, owned: torch.Tensor) -> Request:
        """Fetch all rows, on every peer.

        Args:
            owned: owned rows x k.

        Returns:
            A request whose answer is size x k, fp32.
        """
        return Request(self._all_gather_full, owned)

    def gather_to_root(self, owned: torch.Tensor) -> Request:
        """Collect all rows on the root.

        Args:
            owned: owned rows x k.

        Returns:
            A request whose answer is size x k, fp32, on the root and no rows elsewhere.
        """
        return Request(self._gather_to_root, owned)

    def reduce_to_root(self, held: torch.Tensor) -> Request:
        """Sum on the root what every rank computed for the rows it holds.

        Args:
            held: held rows x k: this rank's contribution.

        Returns:
            A request whose answer is size x k, fp32, on the root and no rows elsewhere.
        """
        return Request(self._reduce_to_root, held)

    def scatter_from_root(self, all_rows: torch.Tensor) -> Request:
        """Send each row from the root to its owner.

        Args:
            all_rows: size x k on the root; a tensor of no rows elsewhere.

        Returns:
            A request whose answer is owned rows x k, fp32.
        """
        return Request(self._scatter_from_root, all_rows)

    def broadcast_from_root(self, all_rows: torch.Tensor) -> Request:
        """Send each row from the root to every rank that holds it.

        Args:
            all_rows: size x k on the root; a tensor of no rows elsewhere.

        Returns:
            A request whose answer is held rows x k, fp32.
        """
        return Request(self._broadcast_from_root, all_rows)
