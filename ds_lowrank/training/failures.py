"""What the error of a rank says, in one line where a user can do something about it."""

from __future__ import annotations

import os
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import torch
import torch.distributed as dist

from ds_lowrank.collectives import RemoteError
from ds_lowrank.training.roll_call import describe, numbers
from ds_lowrank.training.whereabouts import Sign

WAITED_SECONDS = 2.0
"""A rank that was seen waiting for others for this long was not the one that they waited for."""
MOST_PLACES = 3
"""How many places of ranks are told in a line."""
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
        text: what to print, without the rank; empty where that depends on the other ranks. Of a rank that has noticed
            by its watch which one is silent, it says so.
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


def message(
    failure: Failure,
    rank: int,
    crew: Crew,
    found: Mapping[int, Failure],
    limit: str,
    signs: Mapping[int, Sign | None] = MappingProxyType({}),
) -> str | None:
    """What a rank prints when it ends with an error.

    Args:
        failure: its error.
        rank: its number.
        crew: the ranks of the job.
        found: the errors of all ranks that have reported one; empty if nothing is known about the others.
        limit: the time limit of collectives, as ``--timeout 300 s``.
        signs: what ranks were last seen doing.

    Returns:
        The text, or None. An error that all ranks have is printed once, and what another rank has said by rank 0 only.
    """
    if crew.ranks == 1:
        return f"error: {failure.text}"
    if failure.kind is Kind.OWN and len(found) == crew.ranks and len(set(found.values())) == 1:
        return f"error: {failure.text}" if rank == 0 else None
    if failure.kind in (Kind.GONE, Kind.SILENT) and not failure.text:
        failure = _about_others(failure.kind, rank, found, crew, limit, signs)
    if failure.kind is Kind.REMOTE and rank != 0:
        return None
    return textwrap.indent(f"error: {failure.text}", f"{crew.name(rank)}: ", lambda line: True)


def quoted(found: Mapping[int, Failure], crew: Crew) -> Failure | None:
    """The errors that ranks have by themselves, as a rank without an error of its own says it; None if there are none.

    Args:
        found: the errors of the ranks that have reported one.
        crew: the ranks of the job.
    """
    own = [
        f"{crew.name(rank)}: {f.text.partition(chr(10))[0]}"
        for rank, f in found.items()
        if f.kind is Kind.OWN or (f.kind is Kind.SILENT and f.text)
    ]
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


def silence(ranks: Sequence[int], crew: Crew, limit: str, signs: Mapping[int, Sign | None]) -> str:
    """What a rank says that has waited for others in vain.

    Args:
        ranks: those that did not answer; none if all have waited for each other.
        crew: the ranks of the job.
        limit: for how long, as ``--timeout 300 s``.
        signs: what ranks were last seen doing.
    """
    who = _named(ranks, crew) if ranks else "another rank"
    text = f"no answer from {who} within {limit}: stopped, or hanging"
    seen = {rank: str(sign) for rank in ranks or signs if (sign := signs.get(rank)) is not None}
    if len(ranks) == 1 and seen:
        return f"{text}; last seen in {seen[ranks[0]]}"
    places = {place: [rank for rank in seen if seen[rank] == place] for place in seen.values()}
    if not places or len(places) > MOST_PLACES or (len(places) == 1 and not ranks):
        return text
    return f"{text}; last seen: {'; '.join(f'{numbers(there)} in {place}' for place, there in places.items())}"


def waited_for(doing: str) -> str:
    """What a rank says for which the others have waited.

    Args:
        doing: what it does, and its stack.
    """
    return f"the other ranks have waited for this one in vain, which is still in {doing}"


def _about_others(
    kind: Kind, rank: int, found: Mapping[int, Failure], crew: Crew, limit: str, signs: Mapping[int, Sign | None]
) -> Failure:
    """What a rank says that ends only because others do not answer."""
    cause = quoted(found, crew)
    if cause is not None:
        return cause
    missing = [other for other in range(crew.ranks) if other not in found and other != rank]
    if not found:
        missing = kept_by()
    if kind is Kind.SILENT or (found and not missing):  # all have waited for each other, or for who has
        text = silence([other for other in missing if not _waited(signs.get(other))] or missing, crew, limit, signs)
    else:
        who = f" ({_named(missing, crew)})" if missing else ""
        text = f"another rank is gone{who}; its own message, the launcher's or the kernel's log says why. {INTACT}"
    return Failure(Kind.OWN, text)


def kept_by() -> list[int]:
    """The ranks that are named where the store does not answer: rank 0, unless the launcher keeps it."""
    return [] if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else [0]


def _waited(sign: Sign | None) -> bool:
    return sign is not None and sign.waits and sign.still >= WAITED_SECONDS


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
