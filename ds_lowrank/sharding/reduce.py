"""How the sums that methods request become collectives.

There is one kind of request: every rank has some rows of a tall tensor and wants some, and rows that several ranks have
are summed. Reduce-scatter, all-gather, gather to one rank and the exchange of edge rows are all of this kind. All
requests of a round travel together in one all-to-all, so the number of collectives does not depend on the number of
matrices. Contributions are added in rank order, so two ranks that want the same row get the same bits.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from ds_lowrank.sharding.layout import Spans
from ds_lowrank.sharding.route import Route

T = TypeVar("T")
P = ParamSpec("P")
Program = Generator["Request | tuple[Request, ...]", Any, T]
"""What one matrix does: yields a request and is sent the answer, or yields a tuple of requests and is sent a tuple."""
Rounds = Generator[list["Request"], list[torch.Tensor], T]
"""What many matrices do in lockstep: yields the requests of a round and is sent their answers."""


@dataclass(frozen=True)
class Request:
    """Rows of a tall tensor to be exchanged and summed; the answer is the rows that this rank wants.

    Attributes:
        route: who has and who wants which rows.
        value: the rows ``route.have[rank]`` x k, any floating dtype. The answer is ``route.want[rank]`` x k, fp32.
    """

    route: Route
    value: torch.Tensor


def all_reduce_route(ranks: int, rows: int, among: Sequence[int] | None = None) -> Route:
    """A route on which every rank has all rows and wants their sum.

    For small tensors: each rank sends the whole tensor to every other one.

    Args:
        ranks: number of ranks in the group.
        rows: number of rows of the tensor.
        among: the ranks that take part; None for all.
    """
    participants = set(range(ranks) if among is None else among)
    spans: tuple[Spans, ...] = tuple(((0, rows),) if rank in participants else () for rank in range(ranks))
    return Route(spans, spans)


def lockstep(programs: Iterable[Program[T]]) -> Rounds[list[T]]:
    """Run the programs of many matrices side by side, with all their requests of a round in one list.

    Args:
        programs: one per matrix; in the same order on all ranks.

    Returns:
        The result of each program, in order.
    """
    running = dict(enumerate(programs))
    results: dict[int, T] = {}
    answers: dict[int, Any] = dict.fromkeys(running)
    while True:
        yielded: dict[int, Request | tuple[Request, ...]] = {}
        for index, program in list(running.items()):
            try:
                yielded[index] = program.send(answers[index])
            except StopIteration as stop:
                results[index] = stop.value
                del running[index]
        if not running:
            return [results[index] for index in sorted(results)]
        requests = [request for one in yielded.values() for request in (one if isinstance(one, tuple) else (one,))]
        received = iter((yield requests))
        answers = {
            index: tuple(next(received) for _ in one) if isinstance(one, tuple) else next(received)
            for index, one in yielded.items()
        }


def without_rounds(compute: Callable[P, T]) -> Callable[P, Program[T]]:
    """Decorate a function that requests no sums, to use it where a program is expected.

    Args:
        compute: returns the result of the program.
    """

    @functools.wraps(compute)
    def program(*args: P.args, **kwargs: P.kwargs) -> Program[T]:
        yield from ()
        return compute(*args, **kwargs)

    return program


def concurrently(*programs: Program[Any]) -> Program[tuple[Any, ...]]:
    """Run programs of one matrix side by side, in as many rounds as the longest takes.

    Args:
        *programs: in the same order on all ranks.

    Returns:
        The result of each program, in order.
    """
    rounds = lockstep(programs)
    answers: list[torch.Tensor] | None = None
    while True:
        try:
            requests = next(rounds) if answers is None else rounds.send(answers)
        except StopIteration as stop:
            return tuple(stop.value)
        answers = list((yield tuple(requests)))


class Executor(ABC):
    """Runs programs on some ranks: answers their requests round by round.

    Attributes:
        rank: this rank.
        size: number of ranks.
    """

    rank: int
    size: int

    def run(self, rounds: Rounds[T]) -> T:
        """Run many matrices to the end and return their result.

        Args:
            rounds: the programs of all matrices, as made by :func:`lockstep`.
        """
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
        """Answer the requests of one round, in their order.

        Args:
            requests: what this rank requests; the other ranks request the matching rows at the same time.
        """


class SingleProcess(Executor):
    """A process that holds all elements: nothing travels, and every sum is the value itself."""

    rank, size = 0, 1

    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        """Answer each request from its own value."""
        return [receive(request, 0, {}) for request in requests]


class Distributed(Executor):
    """The ranks of one process group; each round is one ``all_to_all_single``.

    Args:
        group: ranks that together hold each matrix. Pipeline stages are in different groups.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        """Answer the requests of one round by one all-to-all over the group."""
        send, send_sizes = packed(requests, self.rank, self.size)
        sizes = incoming_sizes(requests, self.rank, self.size)
        received = send.new_empty(sum(sizes))
        dist.all_to_all_single(received, send, sizes, send_sizes, group=self.group)
        return unpacked(requests, self.rank, torch.split(received, sizes))


def packed(requests: list[Request], rank: int, ranks: int) -> tuple[torch.Tensor, list[int]]:
    """Pack the rows that one rank sends in a round into one buffer.

    Args:
        requests: the rank's requests of the round.
        rank: the rank.
        ranks: number of ranks.

    Returns:
        A flat fp32 buffer in the order of the receivers, and the number of elements for each of them.
    """
    by_peer: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for request in requests:
        value = request.value.float()
        for peer, moves in request.route.plan(rank).sends.items():
            for move in moves:
                piece = value[move.source : move.source + move.count].reshape(-1)
                by_peer[peer].append(piece)
                sizes[peer] += piece.numel()
    pieces = [piece for to_peer in by_peer for piece in to_peer]
    return torch.cat(pieces) if pieces else requests[0].value.new_empty(0, dtype=torch.float32), sizes


def incoming_sizes(requests: list[Request], rank: int, ranks: int) -> list[int]:
    """Number of elements that each rank sends to one rank in a round.

    Args:
        requests: the receiver's requests of the round.
        rank: the receiver.
        ranks: number of ranks.
    """
    sizes = [0] * ranks
    for request in requests:
        columns = request.value.shape[1]
        for peer, rows in request.route.plan(rank).received_rows.items():
            if peer != rank:
                sizes[peer] += rows * columns
    return sizes


def unpacked(requests: list[Request], rank: int, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Unpack the answers to a round's requests.

    Args:
        requests: the receiver's requests of the round.
        rank: the receiver.
        buffers: for each rank, the flat fp32 buffer that it sent.
    """
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
    """Add up the answer to one request, in rank order.

    Args:
        request: the receiver's request.
        rank: the receiver.
        pieces: for each other rank that has wanted rows, its rows x k, fp32.

    Returns:
        wanted rows x k, fp32.
    """
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
