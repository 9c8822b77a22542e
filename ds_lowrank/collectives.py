"""Sharing errors and small Python values between ranks.

Except for ``is_distributed``, ``global_rank`` and ``is_local_rank0``, every function here is a collective over
``group`` (default: all ranks) once ``torch.distributed`` is initialised, and plain local code before that. With NCCL,
every rank must have selected its device (``torch.cuda.set_device``) first.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class RemoteError(RuntimeError):
    """Raised on the ranks that did not fail themselves; the message lists every rank that did, with its error."""


def is_distributed() -> bool:
    """Whether ``torch.distributed`` is available and initialised."""
    return dist.is_available() and dist.is_initialized()


def global_rank() -> int:
    """This process's rank in the whole job; 0 without ``torch.distributed``."""
    return dist.get_rank() if is_distributed() else 0


def is_local_rank0() -> bool:
    """Whether this process is the one on its node that writes the files the other processes of the node read.

    It is the process with ``LOCAL_RANK`` 0, or rank 0 of the job where ``LOCAL_RANK`` is not set.
    """
    return int(os.environ.get("LOCAL_RANK", global_rank())) == 0


def all_gather_object(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather a small picklable value from every rank. Collective.

    Args:
        value: this rank's value.
        group: the ranks that take part; None for all.

    Returns:
        The values in the order of the ranks of ``group``, the same list on every rank.
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gathered_once(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather a picklable value from every rank, equal ones once. Collective.

    Args:
        value: this rank's value; its pickle must be the same wherever it is equal.
        group: the ranks that take part; None for all.

    Returns:
        The different values, in the order of the first ranks that have them; the same list on every rank.
    """
    digests = all_gather_object(hashlib.blake2b(pickle.dumps(value), digest_size=16).digest(), group)
    rank = dist.get_rank(group) if is_distributed() else 0
    is_first = digests.index(digests[rank]) == rank
    found = all_gather_object([value] if is_first else [], group)
    return [one for part in found for one in part]


def any_rank(*flags: bool | torch.Tensor, device: torch.device) -> list[bool]:
    """For each flag, whether it is true on any rank: one all-reduce and one wait, for use in every step. Collective.

    Args:
        flags: this rank's flags. Scalar tensors may still be computed on ``device``.
        device: the device of the process group's tensors.
    """
    own = torch.stack([torch.as_tensor(flag, dtype=torch.int32, device=device) for flag in flags])
    if is_distributed():
        dist.all_reduce(own, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in own.tolist()]


def any_rank_and_mean(
    *flags: bool | torch.Tensor, number: torch.Tensor, device: torch.device
) -> tuple[list[bool], float]:
    """As :func:`any_rank`, and the mean of a number over all ranks in the same all-reduce. Collective.

    Args:
        flags: as there.
        number: this rank's, a scalar. If one is not finite the mean is not, and the flags are right.
        device: the device of the process group's tensors.
    """
    own = [torch.as_tensor(flag, dtype=torch.float64, device=device) for flag in flags]
    total = torch.stack([*own, number.detach().to(device=device, dtype=torch.float64)])
    if is_distributed():
        dist.all_reduce(total)
    *found, summed = total.tolist()
    return [flag > 0 for flag in found], summed / (dist.get_world_size() if is_distributed() else 1)


def raise_if_any_failed(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Return if no rank passes an error; otherwise raise on every rank. Collective.

    Args:
        error: this rank's error, or None if it succeeded.
        group: the ranks that take part; None for all.

    Raises:
        Exception: this rank's own ``error``.
        RemoteError: this rank succeeded and another one failed; the message quotes the other's error.
    """
    if is_distributed():
        text = None if error is None else f"{type(error).__name__}: {error}"
        everyone = all_gather_object((global_rank(), socket.gethostname(), text), group)
        several = len({host for _, host, _ in everyone}) > 1
        failures = [
            f"rank {rank}{f' on {host}' if several else ''}: {text}"
            for rank, host, text in everyone
            if text is not None
        ]
        if error is None and failures:
            raise RemoteError("another rank failed; " + "; ".join(failures))
    if error is not None:
        raise error


@contextmanager
def raise_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block of a ``with`` statement, then raise on every rank if it raised on any. Collective.

    The block itself must not contain a collective that a failing rank would skip: the other ranks would wait in it.

    Args:
        group: the ranks that take part; None for all.

    Raises:
        Exception: what the block raised on this rank.
        RemoteError: the block succeeded on this rank and failed on another one.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_if_any_failed(error, group)


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Compute a small picklable value on rank 0 and return it on every rank. Collective.

    Args:
        make: computes the value; called on rank 0 only.

    Returns:
        The value that ``make`` returned on rank 0.

    Raises:
        Exception: on rank 0, what ``make`` raised.
        RemoteError: on the other ranks, if ``make`` failed on rank 0.
    """
    box: list[Any] = [None]
    with raise_on_all_ranks():
        if global_rank() == 0:
            box[0] = make()
    if is_distributed():
        dist.broadcast_object_list(box, src=0)
    value: T = box[0]
    return value


def first_on_node(make: Callable[[], T]) -> T:
    """Call a function on one process of each node, then on the others, so that only the first downloads. Collective.

    Args:
        make: makes this rank's value; not a collective.

    Returns:
        This rank's own value.

    Raises:
        Exception: what ``make`` raised on this rank.
        RemoteError: ``make`` failed on another rank.
    """
    box: list[T] = []
    for turn in (True, False):
        with raise_on_all_ranks():
            if is_local_rank0() == turn:
                box.append(make())
    return box[0]


def once_per_node(make: Callable[[], T], what: str) -> T:
    """Compute a small picklable value once per node and return it on every rank. Collective.

    Args:
        make: computes the value; called on the local rank 0 of every node.
        what: names the value in the error message.

    Returns:
        The value, which is the same on all nodes.

    Raises:
        ValueError: two nodes computed different values; raised on every rank.
        RuntimeError: no process is the local rank 0 of its node.
        Exception: what ``make`` raised on this rank.
        RemoteError: ``make`` failed on another rank.
    """
    mine: tuple[str, T] | None = None
    with raise_on_all_ranks():
        if is_local_rank0():
            mine = (socket.gethostname(), make())
    made = [box for box in all_gather_object(mine) if box is not None]
    if not made:
        raise RuntimeError("no process has LOCAL_RANK 0: unset LOCAL_RANK, or set it to 0 on one process of each node")
    first, value = made[0]
    others = sorted({host for host, other in made if other != value})
    if others:
        named = f" ({', '.join(others[:5])} from {first})" if others != [first] else ""
        raise ValueError(
            f"{what} differs between the nodes of this job{named}; give every node the same files and packages"
        )
    return value
