"""An in-process world of simulated ranks: the same programs, the same packing, no processes.

Every method meets every layout here in milliseconds, and a run on many ranks is costed on one machine: ``rounds`` and
``bytes_sent`` count what a real world of that size would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from ds_lowrank.sharding.reduce import Request, Rounds, incoming_sizes, packed, unpacked

T = TypeVar("T")


class SimulatedWorld:
    """``size`` ranks in one process.

    Attributes:
        rounds: collectives so far (each is one all-to-all of all ranks).
        bytes_sent: for each rank, the bytes it sent to others so far.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rounds = 0
        self.bytes_sent = [0] * size

    def run(self, programs: Sequence[Rounds[T]]) -> list[T]:
        """Run one program a rank to the end, in lockstep.

        Raises:
            RuntimeError: the ranks asked for different things, which in a real world would hang.
        """
        if len(programs) != self.size:
            raise ValueError(f"a world of {self.size} ranks runs {self.size} programs, got {len(programs)}")
        results: list[T | None] = [None] * self.size
        answers: list[list[object]] | list[None] = [None] * self.size
        while True:
            asked: list[list[Request]] = []
            for rank, program in enumerate(programs):
                try:
                    asked.append(program.send(answers[rank]))  # type: ignore[arg-type]
                except StopIteration as stop:
                    results[rank] = stop.value
            if not asked:
                return results  # type: ignore[return-value]
            if len(asked) != self.size:
                raise RuntimeError(f"the ranks disagree on the round: {len(asked)} of {self.size} ask for anything")
            answers = self._exchange(asked)

    def _exchange(self, asked: list[list[Request]]) -> list[list[object]]:
        ranks = range(self.size)
        sent = []
        for rank in ranks:
            buffer, sizes = packed(asked[rank], rank, self.size)
            self.bytes_sent[rank] += buffer.numel() * buffer.element_size()
            sent.append(torch.split(buffer, sizes))
        self.rounds += 1
        for rank in ranks:
            if [to[rank].numel() for to in sent] != incoming_sizes(asked[rank], rank, self.size):
                raise RuntimeError(f"the ranks disagree on the round: rank {rank} is not sent what it waits for")
        return [list(unpacked(asked[rank], rank, [to[rank] for to in sent])) for rank in ranks]
