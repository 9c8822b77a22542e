"""A board on which ranks post their errors: the store of ``torch.distributed``.

A collective would not do, as some ranks may be gone, stopped, or waiting in another collective. Those that wait learn
from the board that they wait in vain, whatever they wait in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ds_lowrank.training.failures import Crew, Failure, Kind
from ds_lowrank.training.vigil import Vigil, key, read
from ds_lowrank.training.whereabouts import Sign

SECONDS_FOR_OTHERS = 2.0
"""How long a rank that fails waits for the errors of the others, which have the same one or lose their connection."""
SECONDS_BETWEEN_LOOKS = 1.0

ANY, READ = "any", "read"


class Bulletin:
    """The errors of the ranks of a job.

    Args:
        rank: this process's rank.
        crew: the ranks of the job.

    Attributes:
        crew: the ranks of the job.
        signs: what the ranks were last seen doing, once an error was posted or read.
        closed: whether the job is at its end, where a rank that goes has not failed.
    """

    def __init__(self, rank: int, crew: Crew) -> None:
        self.crew = crew
        self.signs: dict[int, Sign] = {}
        self._vigil: Vigil | None = None
        self._rank, self._ranks = rank, crew.ranks
        store = PrefixStore("ds_lowrank/errors", _get_default_store())
        # Connections of their own, as the first may be held by a thread that waits for a key; made now, as later the
        # store may be gone.
        self._store, self._watched = (self._connect(store) for _ in range(2))
        self._claim = threading.Lock()
        self.closed = False

    def _connect(self, store: Any) -> Any:
        return store.clone() if self._ranks > 1 else store

    def claim(self) -> bool:
        """Whether the caller is the first of this process, and hence the one that ends it."""
        first = self._claim.acquire(blocking=False)
        if first and self._vigil is not None:
            self._vigil.end()
        return first

    def close(self) -> None:
        """Stop watching, as the ranks are about to end one after the other."""
        self.closed = True

    def watch(self, end: Callable[[dict[int, Failure]], None], vigil: Vigil) -> None:
        """Call a function in a thread if another rank fails and this one has not ended some seconds later.

        Args:
            end: ends the process; gets the errors of the ranks that have posted one.
            vigil: this rank's part of the watch over ranks that are silent, which begins.
        """
        if self._ranks > 1:
            self._vigil = vigil
            vigil.start()
            threading.Thread(target=self._watch, args=(end,), name="errors of others", daemon=True).start()

    def exchange(self, failure: Failure) -> dict[int, Failure]:
        """Post this rank's error, wait a moment for those of the others, and return all.

        Args:
            failure: this rank's error.

        Returns:
            The errors by rank; empty if the store does not answer.
        """
        found: dict[int, Failure] = {}
        if self._ranks > 1:  # in a thread, as a store whose process is stopped does not answer
            thread = threading.Thread(target=self._exchange, args=(failure, found), daemon=True)
            thread.start()
            thread.join(3 * SECONDS_FOR_OTHERS)
        return dict(found)

    def _watch(self, end: Callable[[dict[int, Failure]], None]) -> None:
        found: dict[int, Failure] = {}
        try:
            while not self._watched.check([ANY]):
                if self._vigil is not None:
                    self._vigil.tell(self._watched)
                time.sleep(SECONDS_BETWEEN_LOOKS)
            found = self._read(self._watched)
        except RuntimeError:
            pass  # the store is gone, and with it the rank or the launcher that kept it
        if self._vigil is not None:
            self._vigil.end()  # ranks that end show no more signs of life
        time.sleep(SECONDS_FOR_OTHERS)
        if not self.closed and self.claim():
            end(found)

    def _exchange(self, failure: Failure, found: dict[int, Failure]) -> None:
        try:
            store = self._store
            store.set(str(self._rank), f"{failure.kind.value}\n{failure.text}")
            store.set(ANY, "")
            everyone = [str(rank) for rank in range(self._ranks)]
            _wait(lambda: store.check(everyone))
            found |= self._read(store)
            store.add(READ, 1)
            if self._rank == 0:  # with which the store may end
                _wait(lambda: store.add(READ, 0) >= len(found))
        except RuntimeError:
            return

    def _read(self, store: Any) -> dict[int, Failure]:
        seen = [rank for rank in range(self._ranks) if store.check([key(rank)])]
        self.signs = {rank: sign for rank in seen if (sign := read(store.get(key(rank)).decode())) is not None}
        posted = [rank for rank in range(self._ranks) if store.check([str(rank)])]
        entries = {rank: store.get(str(rank)).decode().partition("\n") for rank in posted}
        return {rank: Failure(Kind(kind), text) for rank, (kind, _, text) in entries.items()}


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS_FOR_OTHERS
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
