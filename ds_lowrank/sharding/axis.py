"""One dimension of the matrices of a stack, and how the rows of a state tensor along it travel between ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ds_lowrank.sharding.layout import Range, Spans, deal, length
from ds_lowrank.sharding.requests import Request
from ds_lowrank.sharding.route import Route, StackRoute

MOST_STACK_ROUTES = 256
"""Stacks, and kinds of request, whose routes are kept; the oldest is dropped."""


class AxisLayout:
    """Which rows along one dimension each rank holds and which it owns; the same for all matrices that are cut alike.

    A rank *holds* the rows that its elements of the matrix touch; it computes with those. It *owns* some of the rows it
    holds and stores state for those. Every row has one owner.

    Args:
        size: length of the dimension.
        held: for each rank with elements of the matrix, the range of rows that they touch.
        counts: for each of these ranks, how many elements it has.
        peers: the ranks that share the tensor.
        block_rows: how many consecutive rows, counted from row 0, have one owner.

    Attributes:
        held: the spans of rows that each rank holds, by rank.
        owned: the spans of rows that each rank owns, by rank.
    """

    def __init__(
        self, size: int, held: Mapping[int, Range], counts: Mapping[int, int], peers: Sequence[int], block_rows: int
    ) -> None:
        self.size, self._peers = size, peers
        touching = {rank: span for rank, span in held.items() if span[0] < span[1]}
        dealt = deal(list(touching.values()), [counts[rank] for rank in touching], block_rows)
        self.held: dict[int, Spans] = {rank: (span,) for rank, span in touching.items()}
        self.owned: dict[int, Spans] = dict(zip(touching, dealt, strict=True))
        self._routes: dict[str | tuple[str, int], Route] = {}
        self._stack_routes: dict[tuple[str, int | tuple[int, ...]], StackRoute] = {}

    def route(self, kind: str, root: int = 0) -> Route:
        """The route of a kind of request; found once.

        Args:
            kind: a method of :class:`Axis`.
            root: the root, where the kind has one.
        """
        key = (kind, root) if "root" in kind else kind
        if key not in self._routes:
            self._routes[key] = self._found(kind, root)
        return self._routes[key]

    def stack_route(self, kind: str, roots: Sequence[int]) -> StackRoute:
        """The routes of a kind of request for a stack; the same object for stacks that are alike, as plans ask for.

        Args:
            kind: a method of :class:`Axis`.
            roots: the root of each matrix.
        """
        key = (kind, tuple(roots) if "root" in kind else len(roots))
        found = self._stack_routes.get(key)
        if found is None:
            if len(self._stack_routes) == MOST_STACK_ROUTES:
                del self._stack_routes[next(iter(self._stack_routes))]
            found = self._stack_routes[key] = self._new_stack_route(kind, roots)
        return found

    def _new_stack_route(self, kind: str, roots: Sequence[int]) -> StackRoute:
        count = len(roots)
        if "root" not in kind:
            return StackRoute([(self.route(kind), range(count))], count)
        by_root: dict[int, list[int]] = {}
        for position, root in enumerate(roots):
            by_root.setdefault(root, []).append(position)
        routes = [(self.route(kind, root), positions) for root, positions in by_root.items()]
        return StackRoute(routes, count, self.size if kind.endswith("to_root") else None)

    def _found(self, kind: str, root: int) -> Route:
        everything: Spans = ((0, self.size),)
        match kind:
            case "reduce_scatter":
                return Route(self.held, self.owned)
            case "all_gather":
                return Route(self.owned, self.held)
            case "all_gather_full":
                return Route(self.owned, dict.fromkeys(self._peers, everything))
            case "gather_to_root":
                return Route(self.owned, {root: everything})
            case "reduce_to_root":
                return Route(self.held, {root: everything})
            case "scatter_from_root":
                return Route({root: everything}, self.owned)
            case "broadcast_from_root":
                return Route({root: everything}, self.held)
        raise KeyError(kind)


class Axis:
    """The rows of a tall tensor (a basis, a projection) of every matrix in a stack, and how they travel.

    Args:
        layout: who holds and who owns which rows.
        rank: this rank.
        roots: for each matrix, the rank that runs its factorizations.

    Attributes:
        size: length of the dimension.
        held: the range of rows that this rank holds; ``(0, 0)`` for none.
        owned: the spans of rows that this rank owns.
    """

    def __init__(self, layout: AxisLayout, rank: int, roots: Sequence[int]) -> None:
        self.layout, self.rank, self._roots = layout, rank, roots
        self.size = layout.size
        self.held: Range = layout.held.get(rank, ((0, 0),))[0]
        self.owned: Spans = layout.owned.get(rank, ())
        self._stack_routes: dict[str, StackRoute] = {}

    @property
    def held_rows(self) -> int:
        """Number of rows that this rank holds."""
        return self.held[1] - self.held[0]

    @property
    def owned_rows(self) -> int:
        """Number of rows that this rank owns."""
        return length(self.owned)

    def own(self, all_rows: torch.Tensor) -> torch.Tensor:
        """Select the rows that this rank owns from a tensor of all rows.

        Args:
            all_rows: matrices x size x k, any dtype.

        Returns:
            matrices x owned rows x k, same dtype.
        """
        return torch.cat([all_rows[:, :0], *(all_rows[:, lo:hi] for lo, hi in self.owned)], dim=1)

    def own_of_held(self, held: torch.Tensor) -> torch.Tensor:
        """Select the rows that this rank owns from those that it holds.

        Args:
            held: matrices x held rows x k, any dtype.

        Returns:
            matrices x owned rows x k, same dtype: the tensor itself if this rank owns all that it holds.
        """
        first = self.held[0]
        if self.owned == (self.held,):
            return held
        return torch.cat([held[:, :0], *(held[:, lo - first : hi - first] for lo, hi in self.owned)], dim=1)

    def reduce_scatter(self, held: torch.Tensor) -> Request:
        """Sum over ranks what each computed for the rows it holds.

        Args:
            held: matrices x held rows x k: this rank's contribution.

        Returns:
            A request whose answer is the sum of this rank's rows: matrices x owned rows x k, fp32.
        """
        return self._request("reduce_scatter", held)

    def all_gather(self, owned: torch.Tensor) -> Request:
        """Fetch the rows that this rank holds, each from its owner.

        Args:
            owned: matrices x owned rows x k.

        Returns:
            A request whose answer is matrices x held rows x k, fp32.
        """
        return self._request("all_gather", owned)

    def all_gather_full(self, owned: torch.Tensor) -> Request:
        """Fetch all rows, on every peer.

        Args:
            owned: matrices x owned rows x k.

        Returns:
            A request whose answer is matrices x size x k, fp32.
        """
        return self._request("all_gather_full", owned)

    def gather_to_root(self, owned: torch.Tensor) -> Request:
        """Collect all rows of each matrix on its root.

        Args:
            owned: matrices x owned rows x k.

        Returns:
            A request whose answer is rooted matrices x size x k, fp32: those whose root this rank is.
        """
        return self._request("gather_to_root", owned)

    def reduce_to_root(self, held: torch.Tensor) -> Request:
        """Sum on each matrix's root what every rank computed for the rows it holds.

        Args:
            held: matrices x held rows x k: this rank's contribution.

        Returns:
            A request whose answer is rooted matrices x size x k, fp32: those whose root this rank is.
        """
        return self._request("reduce_to_root", held)

    def scatter_from_root(self, all_rows: torch.Tensor) -> Request:
        """Send each row from the matrix's root to its owner.

        Args:
            all_rows: rooted matrices x size x k: those whose root this rank is.

        Returns:
            A request whose answer is matrices x owned rows x k, fp32.
        """
        return self._request("scatter_from_root", all_rows)

    def broadcast_from_root(self, all_rows: torch.Tensor) -> Request:
        """Send each row from the matrix's root to every rank that holds it.

        Args:
            all_rows: rooted matrices x size x k: those whose root this rank is.

        Returns:
            A request whose answer is matrices x held rows x k, fp32.
        """
        return self._request("broadcast_from_root", all_rows)

    def _request(self, kind: str, value: torch.Tensor) -> Request:
        if kind not in self._stack_routes:
            self._stack_routes[kind] = self.layout.stack_route(kind, self._roots)
        return Request(self._stack_routes[kind], value)
