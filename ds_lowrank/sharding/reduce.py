"""How the sums that methods request become collectives.

There is one kind of request: every rank has some rows of a tall tensor and wants some, and rows that several ranks have
are summed. Reduce-scatter, all-gather, gather to one rank and the exchange of edge rows are all of this kind. All
requests of a round travel together in one all-to-all, so the number of collectives does not depend on the number of
matrices. What is sent and how the answers are put together is planned once (:mod:`ds_lowrank.sharding.plan`).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from ds_lowrank.sharding.all_to_all import all_to_all
from ds_lowrank.sharding.plan import Plans
from ds_lowrank.sharding.requests import Program, Request, Rounds
from ds_lowrank.sharding.route import sum_route

__all__ = [
    "Distributed", "Executor", "Program", "Request", "Rounds", "SingleProcess", "concurrently", "lockstep",
    "sum_request", "without_rounds",
]  # fmt: skip

T = TypeVar("T")
P = ParamSpec("P")


def sum_request(value: torch.Tensor, numbers: Sequence[int], ranks: int) -> Request:
    """Sum a few numbers over all ranks of a group. Each gets the same bits, so that all reach the same decision.

    Args:
        value: count x k, any floating dtype.
        numbers: identifies each row of ``value`` on all ranks, whatever order it has on each.
        ranks: number of ranks in the group.

    Returns:
        A request whose answer is count x 1 x k, fp32.
    """
    return Request(sum_route(tuple(numbers), tuple(range(ranks))), value.unsqueeze(1))


def lockstep(programs: Iterable[Program[T]]) -> Rounds[list[T]]:
    """Run the programs of many stacks side by side, with all their requests of a round in one list.

    Args:
        programs: one per stack of matrices; in the same order on all ranks.

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
    """Run programs of one stack side by side, in as many rounds as the longest takes.

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
        """Run many stacks to the end and return their result.

        Args:
            rounds: the programs of all stacks, as made by :func:`lockstep`.
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
        """Answer each request with its own value."""
        return [request.value.float() for request in requests]


class Distributed(Executor):
    """The ranks of one process group; each round is one all-to-all.

    Args:
        group: ranks that together hold each matrix. Pipeline stages are in different groups.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._plans = Plans(self.rank, self.size)

    def exchange(self, requests: list[Request]) -> list[torch.Tensor]:
        """Answer the requests of one round by one all-to-all over the group."""
        plan = self._plans.plan(requests)
        buffer, send = plan.pack(requests)
        all_to_all(plan.received(buffer), send, plan.receive_sizes, plan.send_sizes, self.group)
        return plan.answers(requests, buffer)
