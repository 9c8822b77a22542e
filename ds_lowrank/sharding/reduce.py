"""How the quantities that methods ask for become collectives.

There is one kind of request: every rank has some rows of a tall tensor, every rank wants some, and rows that several
ranks have are summed. A reduce-scatter, an all-gather, a collection on one rank and the exchange of edge rows are all
of this kind. All requests of a round travel together in one all-to-all, so the number of collectives does not depend on
the number of matrices. Contributions are added in rank order, so two ranks that want the same row get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_lowrank.sharding.layout import Spans, length

T = TypeVar("T")
Program = Generator["Request", torch.Tensor, T]
"""One matrix: yields a request, is sent the answer."""
Rounds = Generator[list["Request"], list[torch.Tensor], T]
"""Many matrices in lockstep: yields the requests of a round, is sent their answers."""


@dataclass(frozen=True)
class Move:
    """``count`` rows from position ``source`` of what the sender has to position ``target`` at the receiver."""

    source: int
    target: int
    count: int


class Route:
    """Which rows each rank has (``have[rank]``) and which it wants (``want[rank]``).

    A spans entry lists global row ranges; a rank's tensor holds those rows one after the other.
    """

    def __init__(self, have: Sequence[Spans], want: Sequence[Spans]) -> None:
        if len(have) != len(want):
            raise ValueError(f"a route needs as many wants as haves, got {len(want)} and {len(have)}")
        self.have, self.want = tuple(have), tuple(want)
        self._plans: dict[int, Plan] = {}

    def plan(self, rank: int) -> Plan:
        """What ``rank`` sends, receives and keeps. Computed once."""
        if rank not in self._plans:
            self._plans[rank] = Plan(self, rank)
        return self._plans[rank]


class Plan:
    """One rank's side of a route."""

    def __init__(self, route: Route, rank: int) -> None:
        self.rank = rank
        self.rows = length(route.want[rank])
        self._same_rows = route.have[rank] == route.want[rank]
        ranks = range(len(route.have))
        self.sends = {peer: moves for peer in ranks if (moves := _moves(route.have[rank], route.want[peer]))}
        self.receives = {peer: moves for peer in ranks if (moves := _moves(route.have[peer], route.want[rank]))}

    @cached_property
    def is_identity(self) -> bool:
        """True where the rank keeps exactly what it has and nobody adds to it."""
        return self._same_rows and all(peer == self.rank for peer in self.receives)

    def sent_rows(self, peer: int) -> int:
        return sum(move.count for move in self.sends.get(peer, []))

    def received_rows(self, peer: int) -> int:
        return sum(move.count for move in self.receives.get(peer, []))


def _moves(have: Spans, want: Spans) -> list[Move]:
    moves, source = [], 0
    for a, b in have:
        target = 0
        for c, d in want:
            lo, hi = max(a, c), min(b, d)
            if lo < hi:
                moves.append(Move(source + lo - a, target + lo - c, hi - lo))
            target += d - c
        source += b - a
    return moves


@dataclass(frozen=True)
class Request:
    """``value``: the rows ``route.have[rank]`` of a tensor of ``value.shape[1]`` columns. The answer is fp32."""

    route: Route
    value: torch.Tensor


def lockstep(programs: Iterable[Program[T]]) -> Rounds[list[T]]:
    """Run many programs side by side: all that they ask for in one round is asked for together."""
    running: list[tuple[int, Program[T], Request]] = []
    results: dict[int, T] = {}
    count = 0

    def advance(index: int, program: Program[T], move: Callable[[], Request]) -> None:
        try:
            running.append((index, program, move()))
        except StopIteration as stop:
            results[index] = stop.value

    for index, program in enumerate(programs):
        advance(index, program, program.__next__)
        count += 1
    while running:
        waiting, running = running, []
        answers = yield [request for _, _, request in waiting]
        for (index, program, _), answer in zip(waiting, answers, strict=True):
            advance(index, program, lambda program=program, answer=answer: program.send(answer))  # type: ignore[misc]
    return [results[index] for index in range(count)]


class Alone:
    """One process that holds everything: every sum is the value itself."""

    rank, size = 0, 1

    def run(self, rounds: Rounds[T]) -> T:
        answers: list[torch.Tensor] | None = None
        try:
            while True:
                requests = next(rounds) if answers is None else rounds.send(answers)
                answers = [receive(request, 0, {}) for request in requests]
        except StopIteration as stop:
            result: T = stop.value
            return result


class Distributed:
    """The ranks of one process group. Each round is one ``all_to_all_single``.

    Args:
        group: the ranks that hold the matrices once between them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def run(self, rounds: Rounds[T]) -> T:
        answers: list[torch.Tensor] | None = None
        try:
            while True:
                requests = next(rounds) if answers is None else rounds.send(answers)
                answers = self._exchange(requests)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        outgoing = [packed(requests, self.rank, peer) for peer in range(self.size)]
        sizes = [incoming_size(requests, self.rank, peer) for peer in range(self.size)]
        send = torch.cat(outgoing)
        received = send.new_empty(sum(sizes))
        dist.all_to_all_single(received, send, sizes, [buffer.numel() for buffer in outgoing], group=self.group)
        return unpacked(requests, self.rank, dict(enumerate(torch.split(received, sizes))))


def packed(requests: list[Request], rank: int, peer: int) -> torch.Tensor:
    """All that ``rank`` sends to ``peer`` in one round, flat fp32. Empty for the rank itself."""
    device = requests[0].value.device
    pieces = [
        request.value[move.source : move.source + move.count].reshape(-1).float()
        for request in requests
        if peer != rank
        for move in request.route.plan(rank).sends.get(peer, [])
    ]
    return torch.cat(pieces) if pieces else torch.empty(0, device=device)


def incoming_size(requests: list[Request], rank: int, peer: int) -> int:
    """How many elements ``peer`` sends to ``rank`` in this round."""
    if peer == rank:
        return 0
    return sum(request.route.plan(rank).received_rows(peer) * request.value.shape[1] for request in requests)


def unpacked(requests: list[Request], rank: int, buffers: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """The answers to a round's requests, from the flat buffer that each peer sent."""
    positions = dict.fromkeys(buffers, 0)
    answers = []
    for request in requests:
        columns = request.value.shape[1]
        pieces = {}
        for peer in request.route.plan(rank).receives:
            if peer != rank:
                numel = request.route.plan(rank).received_rows(peer) * columns
                pieces[peer] = buffers[peer][positions[peer] : positions[peer] + numel].view(-1, columns)
                positions[peer] += numel
        answers.append(receive(request, rank, pieces))
    return answers


def receive(request: Request, rank: int, pieces: dict[int, torch.Tensor]) -> torch.Tensor:
    """One request's answer: the contributions of all ranks, the own one included, added in rank order."""
    plan = request.route.plan(rank)
    if plan.is_identity:
        return request.value.float()
    answer = request.value.new_zeros((plan.rows, request.value.shape[1]), dtype=torch.float32)
    for peer, moves in plan.receives.items():
        position = 0
        for move in moves:
            if peer == rank:
                piece = request.value[move.source : move.source + move.count]
            else:
                piece = pieces[peer][position : position + move.count]
                position += move.count
            answer[move.target : move.target + move.count] += piece
    return answer
