"""A watch over ranks that stop answering where no collective notices it, or not for long.

Each rank posts signs of life and watches those of the rank before it. One whose process is stopped posts none. One that
hangs while it writes files, which may take long, neither computes nor writes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ds_lowrank.training.whereabouts import Observer, Sign, Stage, current

SECONDS_BETWEEN_LOOKS = 1.0


def key(rank: int) -> str:
    """Under which a rank posts its signs."""
    return f"sign/{rank}"


class Vigil:
    """One rank's part of the watch.

    Args:
        rank: this process's rank.
        ranks: how many there are.
        seconds: for how long a rank may be silent.
        silent: called once, in a thread, with a rank that is silent and the last sign of it, if there was one; with
            None for both where the store does not answer.
    """

    def __init__(
        self, rank: int, ranks: int, seconds: float, silent: Callable[[int | None, Sign | None], None]
    ) -> None:
        self._rank, self._other = rank, (rank - 1) % ranks
        self._seconds, self._silent = seconds + 2 * SECONDS_BETWEEN_LOOKS, silent  # as old as a sign may be
        self._sign = current()
        self._number, self._heard, self._ended = 0, "", False
        # Counted in time that this process was awake: after a job was suspended, no rank has been silent for long.
        self._awake = self._heard_at = self._answered_at = 0.0

    def start(self) -> None:
        """Begin to look at this process and at what was heard of the other."""
        threading.Thread(target=self._keep, name="vigil", daemon=True).start()

    def end(self) -> None:
        """Look no longer, as this process ends; its last sign stays."""
        self._ended = True

    def tell(self, store: Any) -> None:
        """Post a sign of this rank, and hear of the other. Called in a thread, as the store may not answer.

        Args:
            store: where the ranks post.
        """
        if self._ended:
            return
        self._number += 1
        store.set(key(self._rank), f"{self._number}\n{self._sign.dumps()}")
        heard = store.get(key(self._other)).decode() if store.check([key(self._other)]) else ""
        if heard != self._heard:
            self._heard, self._heard_at = heard, self._awake
        self._answered_at = self._awake

    def _keep(self) -> None:
        observer, before = Observer(), time.monotonic()
        while not self._ended:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            now = time.monotonic()
            self._awake, before = self._awake + min(now - before, 2 * SECONDS_BETWEEN_LOOKS), now
            self._sign = observer.look()
            found = self._judge()
            if found is not None and not self._ended:
                self._silent(*found)
                return

    def _judge(self) -> tuple[int | None, Sign | None] | None:
        sign = read(self._heard)
        if self._awake - self._answered_at > self._seconds:
            return None, None
        if self._awake - self._heard_at > self._seconds:
            return self._other, sign
        hangs = sign is not None and sign.stage == Stage.FILES.value and sign.idle > self._seconds and not sign.waits
        return (self._other, sign) if hangs else None


def read(posted: str) -> Sign | None:
    """The sign in what a rank has posted; None if it has posted nothing.

    Args:
        posted: the text.
    """
    return Sign.loads(posted.partition("\n")[2]) if posted else None
