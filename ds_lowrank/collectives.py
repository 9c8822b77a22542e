"""What one rank of a job knows and all must act on: its errors, and small values only it should compute.

Every function here is a collective over `group` (default: all ranks) once `torch.distributed` is initialised, and plain
local code before. With NCCL each rank must have chosen its device (`torch.cuda.set_device`) first.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class RemoteError(RuntimeError):
    """Raised on the ranks that did not fail themselves: names each rank that did, and its error."""


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def global_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def is_local_rank0() -> bool:
    """True on the one process of each node that writes what the node's others read: `LOCAL_RANK` 0, else rank 0."""
    return int(os.environ.get("LOCAL_RANK", global_rank())) == 0


def raise_if_any_failed(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Return if no rank passes an error; otherwise raise on every rank.

    A rank that failed raises its own error, the others a `RemoteError` that quotes it. Every rank of `group` must call.
    """
    if is_distributed():
        mine = None if error is None else f"rank {global_rank()}: {type(error).__name__}: {error}"
        failures = [failure for failure in _gather(mine, group) if failure is not None]
        if error is None and failures:
            raise RemoteError("another rank failed; " + "; ".join(failures))
    if error is not None:
        raise error


@contextmanager
def raise_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block, then raise on every rank if it raised on any.

    The block must not itself contain a collective that a failing rank would skip: the others would wait in it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_if_any_failed(error, group)


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """`make()` of rank 0, on every rank. For small picklable values; an error of `make` is raised on every rank."""
    box: list[Any] = [None]
    with raise_on_all_ranks():
        if global_rank() == 0:
            box[0] = make()
    if is_distributed():
        dist.broadcast_object_list(box, src=0)
    value: T = box[0]
    return value


def once_per_node(make: Callable[[], T], what: str) -> T:
    """`make()`, computed once on each node, on every rank; a `ValueError` on every rank if two nodes differ.

    `what` names the value in that error.
    """
    mine: tuple[T] | None = None
    with raise_on_all_ranks():
        if is_local_rank0():
            mine = (make(),)
    made = [box for box in (_gather(mine, None) if is_distributed() else [mine]) if box is not None]
    if not made:
        raise RuntimeError("no process leads a node: LOCAL_RANK is set on every rank but 0 on none")
    if any(box != made[0] for box in made):
        raise ValueError(f"{what} differs between the nodes of this job; give every node the same files and packages")
    value: T = made[0][0]
    return value


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
