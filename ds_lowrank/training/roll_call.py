"""The roll call at the start of a job: which ranks are there, on which nodes, and with which packages.

It needs nothing but the store that the launcher's variables name, so it comes before process groups, which would wait
for a rank that never comes and cannot say which one it was. Rank 0 reads what every rank posts, decides, and posts one
answer for all.

``torchrun`` keeps the store when it starts the ranks again, maybe not as often on every node. Each rank 0 therefore
opens a call of its own, with the next number. A rank takes an answer for its own only if it is in it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed.distributed_c10d import Store

from ds_lowrank.errors import ConfigError

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_READ = 3.0
"""How long rank 0, which may keep the store, waits until all have read that the job cannot start."""
GRACE_SECONDS = 15.0
"""How much longer than rank 0 the others wait: they may have come before it."""

LONGEST = 8
"""How many nodes are named in a line."""

NUMBER, ANSWER, READ = "number", "answer", "read"


@dataclass(frozen=True)
class Presence:
    """What a rank says of itself.

    Attributes:
        host: the name of its node.
        facts: what must be the same on all ranks, by name.
        machine: differs between machines, also if they have the same name.
    """

    host: str
    facts: Mapping[str, str]
    machine: str = ""


@dataclass(frozen=True)
class Present:
    """The ranks of a job that can start.

    Attributes:
        call: the number of the roll call, which differs from those before a restart.
        hosts: the node of every rank.
    """

    call: int
    hosts: tuple[str, ...]


def call_roll(
    store: Store,
    rank: int,
    ranks: int,
    mine: Presence,
    seconds: float,
    problem: Callable[[Sequence[Presence]], str | None],
) -> Present:
    """Wait until all ranks are there, and agree that the job can start. Collective.

    Args:
        store: the store of the job.
        rank: this process's rank.
        ranks: the number of ranks.
        mine: what this rank says of itself.
        seconds: how long to wait for ranks that do not come.
        problem: called on rank 0 with what all ranks say; says why they cannot work together, or None.

    Raises:
        ConfigError: ranks have not come in time, or cannot work together; the same message on every rank.
    """
    own = uuid.uuid4().hex
    entry = json.dumps({"id": own, **asdict(mine)})
    if rank == 0:
        call = store.add(NUMBER, 1)
        store.set(f"{call}/0", entry)
        answer = _decide(store, call, ranks, seconds, problem)
        store.set(f"{call}/{ANSWER}", json.dumps(answer))
        if answer["problem"]:
            _wait(lambda: store.add(f"{call}/{READ}", 0) >= answer["here"] - 1, SECONDS_TO_READ)
    else:
        call, answer = _answer(store, rank, own, entry, seconds)
        store.add(f"{call}/{READ}", 1)
    if answer["problem"]:
        raise ConfigError(answer["problem"])
    return Present(call, tuple(answer["hosts"]))


def _decide(
    store: Store, call: int, ranks: int, seconds: float, problem: Callable[[Sequence[Presence]], str | None]
) -> dict[str, Any]:
    keys = [f"{call}/{rank}" for rank in range(ranks)]
    complete = _wait(lambda: store.check(keys), seconds)
    here = [rank for rank in range(ranks) if complete or store.check([keys[rank]])]
    entries = [json.loads(value) for value in store.multi_get([keys[rank] for rank in here])]
    machines = {(entry["host"], entry["machine"]) for entry in entries}
    twice = {host for host, count in Counter(host for host, _ in machines).items() if count > 1}
    hosts = [f"{e['host']}-{e['machine'][:6]}" if e["host"] in twice else str(e["host"]) for e in entries]
    if complete:
        found = problem([Presence(host, entry["facts"]) for host, entry in zip(hosts, entries, strict=True)])
    else:
        found = _absent(dict(zip(here, hosts, strict=True)), ranks, seconds)
    return {"problem": found, "here": len(here), "ids": [entry["id"] for entry in entries], "hosts": hosts}


def _absent(here: Mapping[int, str], ranks: int, seconds: float) -> str:
    missing = numbers([rank for rank in range(ranks) if rank not in here])
    return (
        f"{missing} of {ranks} did not come within --join-timeout {seconds:g} s, only {describe(here)} did. Look for "
        "what the launcher says about the other nodes, check that they can be reached, or give a longer --join-timeout"
    )


def _answer(store: Store, rank: int, own: str, entry: str, seconds: float) -> tuple[int, dict[str, Any]]:
    """The call that this rank is in, and rank 0's answer."""
    call, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        newest = store.add(NUMBER, 0)
        if newest != call:
            call, end = newest, time.monotonic() + seconds + GRACE_SECONDS
            store.set(f"{call}/{rank}", entry)
        if call and store.check([f"{call}/{ANSWER}"]):
            answer = json.loads(store.get(f"{call}/{ANSWER}"))
            if own in answer["ids"]:
                return call, answer
        time.sleep(SECONDS_BETWEEN_LOOKS)
    raise ConfigError(
        f"rank 0 did not come within --join-timeout {seconds:g} s: look for its error, or give a longer --join-timeout"
    )


def describe(hosts: Sequence[str] | Mapping[int, str]) -> str:
    """Which ranks are on which nodes, as ``ranks 0, 1 on node1, ranks 2, 3 on node2``.

    Args:
        hosts: the node of each rank.
    """
    by_host: dict[str, list[int]] = {}
    for rank, host in hosts.items() if isinstance(hosts, Mapping) else enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    shown = [f"{numbers(ranks)} on {host}" for host, ranks in by_host.items()]
    if len(shown) > LONGEST:
        shown[LONGEST - 1 : -1] = ["..."]
    return ", ".join(shown)


def numbers(ranks: Sequence[int]) -> str:
    """Ranks in words: ``rank 3``, ``ranks 0, 4``, ``ranks 0 to 7``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return True
