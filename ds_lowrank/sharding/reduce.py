"""How the quantities that methods ask for become collectives.

There is one kind of request: every rank has some rows of a tall tensor, every rank wants some, and rows that several
ranks have are summed. A reduce-scatter, an all-gather, a collection on one rank and the exchange of edge rows are all
of this kind. All requests of a round travel together in one all-to-all, so the number of collectives does not depend on
the number of matrices. Contributions are added in rank order, so two ranks that want the same row get the same bits.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from ds_lowrank.sharding.layout import Spans, length

T = TypeVar("T")
P = ParamSpec("P")
Program = Generator["Request | tuple[Request, ...]", Any, T]
"""One matrix: yields a request and is sent the answer, or several at once and is sent a tuple of answers."""
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
        self._plans: dict[int, RankRoute] = {}

    def plan(self, rank: int) -> RankRoute:
        """What ``rank`` sends, receives and keeps. Computed once."""
        if rank not in self._plans:
            self._plans[rank] = RankRoute(self, rank)
        return self._plans[rank]


class RankRoute:
    """One rank's side of a route.

    Attributes:
        rows: how many rows the rank wants.
        sends: for each other rank that wants some of this rank's rows, where they are.
        receives: for each rank that has wanted rows, in rank order and the own rank included, where they go.
        received_rows: how many those are.
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
        """True where the rank keeps exactly what it has and nobody adds to it."""


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


def all_reduce_route(ranks: int, rows: int, among: Sequence[int] | None = None) -> Route:
    """Every rank has all rows and wants their sum. For small tensors: each rank sends all of it to every other.

    Args:
        among: the ranks that take part; None for all.
    """
    taking_part = set(range(ranks) if among is None else among)
    spans: tuple[Spans, ...] = tuple(((0, rows),) if rank in taking_part else () for rank in range(ranks))
    return Route(spans, spans)


def lockstep(programs: Iterable[Program[T]]) -> Rounds[list[T]]:
    """Run many programs side by side: all that they ask for in one round is asked for together."""
    running = dict(enumerate(programs))
    results: dict[int, T] = {}
    answers: dict[int, Any] = dict.fromkeys(running)
    while True:
        asked: dict[int, Request | tuple[Request, ...]] = {}
        for index, program in list(running.items()):
            try:
                asked[index] = program.send(answers[index])
            except StopIteration as stop:
                results[index] = stop.value
                del running[index]
        if not running:
            return [results[index] for index in sorted(results)]
        flat = [request for one in asked.values() for request in (one if isinstance(one, tuple) else (one,))]
        received = iter((yield flat))
        answers = {
            index: tuple(next(received) for _ in one) if isinstance(one, tuple) else next(received)
            for index, one in asked.items()
        }


def without_rounds(compute: Callable[P, T]) -> Callable[P, Program[T]]:
    """Make a function that asks for no sums into a program, for use where a program is expected."""

    @functools.wraps(compute)
    def program(*args: P.args, **kwargs: P.kwargs) -> Program[T]:
        yield from ()
        return compute(*args, **kwargs)

    return program


def concurrently(*programs: Program[Any]) -> Program[tuple[Any, ...]]:
    """Run programs of one matrix side by side, in the rounds of the longest."""
    rounds = lockstep(programs)
    answers: list[torch.Tensor] | None = None
    while True:
        try:
            requests = next(rounds) if answers is None else rounds.send(answers)
        except StopIteration as stop:
            return tuple(stop.value)
        answers = list((yield tuple(requests)))


class Executor(ABC):
    """Drives a program's rounds.

    Attributes:
        rank, size: this rank, and how many there are.
    """

    rank: int
    size: int

    def run(self, rounds: Rounds[T]) -> T:
        """Run the program to its end and return its result."""
        answers: list[torch.Tensor] | None = None
        try:
            while True:
                requests = next(rounds) if answers is None else rounds.send(answers)
                answers = self.exchange(requests)
        except StopIteration as stop:
            result: T = stop.value
            return result

    @abstractmethod
    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        """Answer one round."""


class SingleProcess(Executor):
    """One process that holds everything: every sum is the value itself."""

    rank, size = 0, 1

    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        return [receive(request, 0, {}) for request in requests]


class Distributed(Executor):
    """The ranks of one process group. Each round is one ``all_to_all_single``.

    Args:
        group: the ranks that hold the matrices once between them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        send, send_sizes = packed(requests, self.rank, self.size)
        sizes = incoming_sizes(requests, self.rank, self.size)
        received = send.new_empty(sum(sizes))
        dist.all_to_all_single(received, send, sizes, send_sizes, group=self.group)
        return unpacked(requests, self.rank, torch.split(received, sizes))


def packed(requests: list[Request], rank: int, ranks: int) -> tuple[torch.Tensor, list[int]]:
    """All that ``rank`` sends in one round, flat fp32, in the order of the receivers; and how much goes to each."""
    pieces: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for request in requests:
        value = request.value.float()
        for peer, moves in request.route.plan(rank).sends.items():
            for move in moves:
                piece = value[move.source : move.source + move.count].reshape(-1)
                pieces[peer].append(piece)
                sizes[peer] += piece.numel()
    flat = [piece for of_peer in pieces for piece in of_peer]
    return torch.cat(flat) if flat else requests[0].value.new_empty(0, dtype=torch.float32), sizes


def incoming_sizes(requests: list[Request], rank: int, ranks: int) -> list[int]:
    """How many elements each rank sends to ``rank`` in this round."""
    sizes = [0] * ranks
    for request in requests:
        columns = request.value.shape[1]
        for peer, rows in request.route.plan(rank).received_rows.items():
            if peer != rank:
                sizes[peer] += rows * columns
    return sizes


def unpacked(requests: list[Request], rank: int, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The answers to a round's requests, from the flat buffer that each rank sent."""
    positions = [0] * len(buffers)
    answers = []
    for request in requests:
        columns = request.value.shape[1]
        pieces = {}
        for peer, rows in request.route.plan(rank).received_rows.items():
            if peer != rank:
                start = positions[peer]
                positions[peer] = start + rows * columns
                pieces[peer] = buffers[peer][start : positions[peer]].view(rows, columns)
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
