"""One rank at one end of the wire: builds the contenders, and takes a step of one whenever it is told to.

The driver talks to it over a Unix socket, so that nothing but the training is on the wire.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.thin_wire.contenders import LENGTH, Contender, Step, Text, build

COLLECTIVES = (
    "a round of ds_lowrank", "all_to_all_single", "all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor",
    "reduce", "broadcast",
)  # fmt: skip
"""What :func:`collectives` can call."""
LATE = 0.01
"""Seconds."""
ROUNDS = 20
"""Rounds of one number, of which the mean is taken."""

Answer = dict[str, Any]


class Rank:
    """What a rank keeps between the driver's messages.

    Args:
        driver: Where messages come from.
    """

    def __init__(self, driver: Connection) -> None:
        self._driver = driver
        self._contenders: dict[str, Contender] = {}
        self._steps: dict[str, Step] = {}
        self._taken: dict[str, int] = {}
        self._text = Text(LENGTH, dist.get_rank())

    def serve(self) -> None:
        """Answer messages until there is one without a name."""
        while (message := self._driver.recv())["do"] != "end":
            self._driver.send(getattr(self, message.pop("do"))(**message))

    def build(self, contender: Contender, model: dict[str, Any], seed: int) -> Answer:
        """Build one contender; where the package refuses its options, the answer says why."""
        from transformers import LlamaConfig

        from ds_lowrank.errors import ConfigError

        try:
            step = build(contender, LlamaConfig(**model), seed)
        except ConfigError as error:
            return {"refused": str(error).splitlines()[0]}
        self._contenders[contender.name], self._steps[contender.name] = contender, step
        self._taken[contender.name] = 0
        return {"refused": None}

    def step(self, name: str) -> Answer:
        """Take one step."""
        batches = self._text.batches(self._taken[name], self._contenders[name].micro_batches)
        self._taken[name] += 1
        started = time.perf_counter()
        loss = self._steps[name](batches)
        return {"loss": loss, "seconds": time.perf_counter() - started}

    def probe(self, name: str, numbers: int) -> Answer:
        """Run a collective once, for which the last rank comes late, as ranks do in training; then it is timed there.

        Rounds of one number for each rank are run several times, and their mean is answered.
        """
        call, small = collectives(numbers)[name], numbers <= dist.get_world_size()
        repeats = ROUNDS if small else 1
        dist.barrier()
        if dist.get_rank() == dist.get_world_size() - 1 and not small:
            time.sleep(LATE)
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return {"seconds": (time.perf_counter() - started) / repeats}


def collectives(numbers: int) -> dict[str, Callable[[], object]]:
    """Return collectives over tensors of that many fp32 numbers a rank, by their names in :data:`COLLECTIVES`."""
    from ds_lowrank.sharding.all_to_all import all_to_all

    ranks = dist.get_world_size()
    whole = torch.ones(numbers, dtype=torch.float32, device="cpu")
    answer = torch.empty_like(whole)
    share = torch.empty(numbers // ranks, dtype=torch.float32, device="cpu")
    group = dist.distributed_c10d._get_default_group()
    calls = (
        partial(all_to_all, answer, whole, [numbers // ranks] * ranks, [numbers // ranks] * ranks, group),
        partial(dist.all_to_all_single, answer, whole),
        partial(dist.all_reduce, whole),
        partial(dist.reduce_scatter_tensor, share, whole),
        partial(dist.all_gather_into_tensor, answer, share),
        partial(dist.reduce, whole, 0),
        partial(dist.broadcast, whole, 0),
    )
    return dict(zip(COLLECTIVES, calls, strict=True))


def main() -> None:
    """Join the other rank, and serve the driver at the socket that the command line names."""
    torch.set_num_threads(1)
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(os.environ["RANK"]) % len(processors)]})
    from ds_lowrank.training import distributed

    with Client(sys.argv[1], family="AF_UNIX") as driver:
        distributed.join()
        logging.disable(logging.WARNING)
        driver.send({"rank": dist.get_rank()})
        Rank(driver).serve()
        distributed.leave()


if __name__ == "__main__":
    main()
