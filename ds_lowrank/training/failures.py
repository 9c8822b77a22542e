"""What the error of a rank says, in one line where a user can do something about it."""

from __future__ import annotations

import os
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist

from ds_lowrank.collectives import RemoteError
from ds_lowrank.training.roll_call import describe, numbers

INTACT = "Checkpoints are intact: --resume continues from the newest"


class Kind(Enum):
    """What an error says about its rank: it failed itself, repeats another's error, or lost or missed another rank."""

    OWN = "own"
    REMOTE = "remote"
    GONE = "gone"
    SILENT = "silent"


@dataclass(frozen=True)
class Failure:
    """The error of a rank.

    Attributes:
        kind: what it says about the rank.
        text: what to print, without the rank; empty where that depends on the other ranks.
    """

    kind: Kind
    text: str = ""

    @classmethod
    def of(cls, error: Exception, expected: tuple[type[Exception], ...]) -> Failure:
        """Classify an error.

        Args:
            error: the error.
            expected: kinds of errors whose messages say what to change. Of others the traceback is printed.
        """
        lost = next((link for link in _chain(error) if is_from_network(link)), None)
        if lost is not None:
            text = str(lost).lower()
            return cls(Kind.SILENT if "timeout" in text or "timed out" in text else Kind.GONE)
        if isinstance(error, RemoteError):
            return cls(Kind.REMOTE, _text(error))
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            first = str(error).partition("\n")[0] or "out of memory"
            return cls(Kind.OWN, f"{first}; lower --micro-batch-size or --sequence-length, or raise the ZeRO stage")
        if isinstance(error, expected):
            return cls(Kind.OWN, _text(error))
        what = f"{type(error).__name__}, which is a bug; please report it with these lines:\n"
        return cls(Kind.OWN, what + "".join(traceback.format_exception(error)))


@dataclass(frozen=True)
class Crew:
    """The ranks of a job.

    Attributes:
        ranks: how many there are.
        hosts: the node of each; empty where they are all on one, or where that is not known.
    """

    ranks: int
    hosts: tuple[str, ...] = ()

    def name(self, rank: int) -> str:
        """A rank in words, with its node if there are several: ``rank 3 on node2``."""
        return f"rank {rank} on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else f"rank {rank}"


def message(failure: Failure, rank: int, crew: Crew, found: Mapping[int, Failure], timeout: float) -> str | None:
    """What a rank prints when it ends with an error.

    Args:
        failure: its error.
        rank: its number.
        crew: the ranks of the job.
        found: the errors of all ranks that have reported one; empty if nothing is known about the others.
        timeout: the time limit of collectives in seconds.

    Returns:
        The text, or None. An error that all ranks have is printed once, and what another rank has said by rank 0 only.
    """
    if crew.ranks == 1:
        return f"error: {failure.text}"
    if failure.kind is Kind.OWN and len(found) == crew.ranks and len(set(found.values())) == 1:
        return f"error: {failure.text}" if rank == 0 else None
    if failure.kind in (Kind.GONE, Kind.SILENT):
        failure = _about_others(failure.kind, found, crew, timeout)
    if failure.kind is Kind.REMOTE and rank != 0:
        return None
    return textwrap.indent(f"error: {failure.text}", f"{crew.name(rank)}: ", lambda line: True)


def quoted(found: Mapping[int, Failure], crew: Crew) -> Failure | None:
    """The errors that ranks have by themselves, as a rank without an error of its own says it; None if there are none.

    Args:
        found: the errors of the ranks that have reported one.
        crew: the ranks of the job.
    """
    own = [f"{crew.name(rank)}: {f.text.partition(chr(10))[0]}" for rank, f in found.items() if f.kind is Kind.OWN]
    return Failure(Kind.REMOTE, f"another rank failed; {'; '.join(own)}") if own else None


def unanswered(rank: int, crew: Crew, seconds: float) -> str:
    """What a rank says that has lost a node.

    Args:
        rank: a rank on that node.
        crew: the ranks of the job.
        seconds: for how long the node has not answered.
    """
    host = crew.hosts[rank]
    others = numbers([rank for rank in range(crew.ranks) if crew.hosts[rank] == host])
    return (
        f"no answer from {host} ({others}) for {seconds:g} s: it has no power, or there is no network between it and "
        f"this node. {INTACT}"
    )


def _about_others(kind: Kind, found: Mapping[int, Failure], crew: Crew, timeout: float) -> Failure:
    """What a rank says that ends only because others do not answer."""
    cause = quoted(found, crew)
    if cause is not None:
        return cause
    missing = [rank for rank in range(crew.ranks) if rank not in found]
    if not found:  # The store is not reachable. Where the launcher does not keep it, rank 0 does.
        missing = [] if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else [0]
    who = _named(missing, crew)
    if kind is Kind.SILENT:
        text = (
            f"no answer from {who if missing else 'another rank'} within --timeout {timeout:g} s: stopped, or hanging"
        )
    else:
        text = (
            f"another rank is gone{f' ({who})' if missing else ''}; its own message, the launcher's or the kernel's "
            f"log says why. {INTACT}"
        )
    return Failure(Kind.OWN, text)


def _named(ranks: Sequence[int], crew: Crew) -> str:
    return (
        describe({rank: crew.hosts[rank] for rank in ranks})
        if len(set(crew.hosts)) > 1
        else (f"rank {', '.join(map(str, ranks))}")
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _text(error: Exception) -> str:
    """An error's message, without the half characters that stand for bytes of a path which are not UTF-8."""
    return str(error).encode(errors="backslashreplace").decode()


def is_from_network(error: BaseException) -> bool:
    """Whether an error is gloo's, NCCL's or the store's about a lost connection or a timeout."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
