"""Run a function on several ranks, each a process forked from one warm server: 0.1 to 0.4 seconds a test."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PRELOAD = "tests.engines.preload"


def warm_context() -> Any:
    """A multiprocessing context that forks its processes from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 180, device: str = "cpu", **named: Any
) -> list[Any]:
    """Run ``function(*args, **named)`` on ``world`` ranks of a process group: gloo on a CPU, NCCL on ``cuda``.

    A process that uses CUDA cannot be forked from one that has imported DeepSpeed for the CPU; it starts afresh.

    Args:
        world: Number of ranks.
        function: A function at the top level of a module, so that it can be pickled.
        timeout: Seconds to wait for each rank's result.
        device: ``cpu`` or ``cuda``.

    Returns:
        One result for each rank, in order.

    Raises:
        AssertionError: A rank raised (with its traceback), died, or did not finish in time.
    """
    context = warm_context() if device == "cpu" else multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        workers = [
            context.Process(
                target=_rank, args=(rank, world, store, pipes[rank][1], device, partial(function, *args, **named))
            )
            for rank in range(world)
        ]
        for worker, (_, sender) in zip(workers, pipes, strict=True):
            worker.start()
            sender.close()
        results = []
        try:
            for rank, (receiver, _) in enumerate(pipes):
                if not receiver.poll(timeout):
                    raise AssertionError(f"rank {rank} of {world} did not answer in {timeout} s")
                results.append(pickle.loads(receiver.recv_bytes()))
        except EOFError:
            raise AssertionError(f"rank {len(results)} of {world} died without an answer") from None
        finally:
            for worker in workers:
                worker.join(5)
                if worker.is_alive():
                    worker.kill()
    failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(results) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def _rank(
    rank: int,
    world: int,
    store: str,
    sender: Any,
    device: str,
    function: Callable[[], Any],
) -> None:
    import logging

    os.environ["DS_ACCELERATOR"] = device
    import deepspeed
    import torch
    import torch.distributed as dist

    backend = "gloo" if device == "cpu" else "nccl"

    logging.disable(logging.WARNING)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        answer = (True, function())
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer = (False, traceback.format_exc())
    # Plain pickle, because the pipe's own pickler passes tensors by file descriptors, which end with this process.
    sender.send_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    os._exit(0)
