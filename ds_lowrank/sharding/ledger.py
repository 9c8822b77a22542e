"""One rank of a world that does not exist: what its programs need, and what they say that all ranks send.

A request names what every rank has and wants. So what one rank asks for says what all of them send, without the others,
if it also asks as they do for the matrices that only they have. Nothing is computed: tensors are on the meta device.
"""

from __future__ import annotations

import numpy as np
import torch

from ds_lowrank.sharding.plan import Plans
from ds_lowrank.sharding.reduce import Executor
from ds_lowrank.sharding.requests import Request
from ds_lowrank.sharding.route import Route, SumRoute


class Ledger(Executor):
    """Answers one rank's requests with meta tensors, and notes what each rank of the group sends.

    Args:
        rank: the rank.
        size: how many ranks the group has.

    Attributes:
        rounds: collectives so far.
        bytes_sent: for each rank.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.rounds = rank, size, 0
        self.bytes_sent = np.zeros(size, dtype=np.int64)

    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        """Count what is sent, and answer with tensors of the right shapes."""
        self.rounds += 1
        for request in requests:
            self.bytes_sent += 4 * numbers_sent(request, self.size)
        return [torch.empty(r.answer_shape(self.rank), dtype=torch.float32, device="meta") for r in requests]


class Alone(Executor):
    """A rank that packs and unpacks as in a world of its size, with the same buffers, and hears of nobody.

    Args:
        rank: the rank.
        size: how many ranks the group has.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._plans = Plans(rank, size)

    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        """Answer with what the buffers contain."""
        plan = self._plans.plan(requests)
        buffer, _ = plan.pack(requests)
        return plan.answers(requests, buffer)


def numbers_sent(request: Request, ranks: int) -> np.ndarray:
    """How many numbers each rank sends to others when all of them make a request.

    Args:
        request: of one of them.
        ranks: how many there are.
    """
    _, rows, columns = request.value.shape
    found = np.zeros(ranks, dtype=np.int64)
    if isinstance(request.route, SumRoute):
        for peers in request.route.peers:
            found[list(peers)] += rows * columns * (len(peers) - 1)
        return found
    for route, positions in request.route.routes:
        found += columns * len(positions) * rows_sent(route, ranks)
    return found


def rows_sent(route: Route, ranks: int) -> np.ndarray:
    """How many rows each rank sends to others: those that it has, once for every other rank that wants them.

    Args:
        route: who has and who wants which rows.
        ranks: how many ranks there are.
    """
    size = max((hi for spans in (*route.have.values(), *route.want.values()) for _, hi in spans), default=0)
    edges = np.zeros(size + 1, dtype=np.int64)
    for spans in route.want.values():
        for lo, hi in spans:
            edges[lo] += 1
            edges[hi] -= 1
    wanted = np.concatenate([[0], np.cumsum(np.cumsum(edges))])  # by how many ranks, summed over the rows before
    found = np.zeros(ranks, dtype=np.int64)
    for rank, have in route.have.items():
        own = route.want.get(rank, ())
        found[rank] = sum(wanted[hi] - wanted[lo] for lo, hi in have) - sum(
            max(0, min(b, d) - max(a, c)) for a, b in have for c, d in own
        )
    return found
