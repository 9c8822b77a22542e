"""An in-process world of simulated ranks: the same programs and the same packing as on real ranks, without processes.

Tests run every method on every layout here in milliseconds, and one machine finds the communication of many ranks:
``rounds`` and ``bytes_sent`` count what a real world of that size would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from ds_lowrank.sharding.plan import Plans
from ds_lowrank.sharding.reduce import Request, Rounds

T = TypeVar("T")


class SimulatedWorld:
    """Simulated ranks in one process.

    Args:
        size: number of ranks.

    Attributes:
        rounds: number of collectives so far; each is one all-to-all of all ranks.
        bytes_sent: for each rank, the bytes it has sent to other ranks so far.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rounds = 0
        self.bytes_sent = [0] * size
        self._plans = [Plans(rank, size) for rank in range(size)]

    def run(self, programs: Sequence[Rounds[T]]) -> list[T]:
        """Run one program per rank to its end, in lockstep.

        Args:
            programs: one for each rank, in rank order.

        Returns:
            The result of each program, in rank order.

        Raises:
            ValueError: if there is not one program per rank.
            RuntimeError: if the requests of the ranks do not match. Real ranks would hang.
        """
        if len(programs) != self.size:
            raise ValueError(f"a world of {self.size} ranks needs {self.size} programs, got {len(programs)}")
        results: list[T | None] = [None] * self.size
        answers: list[list[torch.Tensor]] | list[None] = [None] * self.size
        while True:
            requests: list[list[Request]] = []
            for rank, program in enumerate(programs):
                try:
                    requests.append(program.send(answers[rank]))  # type: ignore[arg-type]
                except StopIteration as stop:
                    results[rank] = stop.value
            if not requests:
                return results  # type: ignore[return-value]
            if len(requests) != self.size:
                raise RuntimeError(f"the ranks disagree on the round: {len(requests)} of {self.size} make requests")
            answers = self._exchange(requests)

    def _exchange(self, requests: list[list[Request]]) -> list[list[torch.Tensor]]:
        """Answer one round of all ranks."""
        ranks = range(self.size)
        plans = [self._plans[rank].plan(requests[rank]) for rank in ranks]
        buffers, sent = [], []
        for rank, plan in enumerate(plans):
            buffer, send = plan.pack(requests[rank])
            self.bytes_sent[rank] += send.numel() * send.element_size()
            buffers.append(buffer)
            sent.append(torch.split(send, plan.send_sizes))
        self.rounds += 1
        answers = []
        for rank, plan in enumerate(plans):
            incoming = [to[rank] for to in sent]
            if [message.numel() for message in incoming] != plan.receive_sizes:
                raise RuntimeError(f"the ranks disagree on the round: rank {rank} waits for other rows than it is sent")
            plan.received(buffers[rank]).copy_(torch.cat(incoming))
            answers.append(plan.answers(requests[rank], buffers[rank]))
        return answers
