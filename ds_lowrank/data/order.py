"""The order in which finite data are visited. It depends on nothing but the seed and the step number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class EpochOrder:
    """Global batches of item numbers, in a new random order each epoch.

    The permutation of an epoch is drawn from (seed, epoch). The last ``count % size`` items of an epoch's order are
    skipped in that epoch, so that no global batch spans two epochs.

    Args:
        count: the number of items.
        size: items per global batch, at most ``count``.
        seed: seed of the permutations.

    Attributes:
        steps_per_epoch: global batches per epoch, ``count // size``.
    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        self._count = count
        self._size = size
        self._seed = seed
        self.steps_per_epoch = count // size
        self._drawn: tuple[int, npt.NDArray[np.int64]] | None = None

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, both counted from 0."""
        return step // self.steps_per_epoch

    def items(self, step: int) -> npt.NDArray[np.int64]:
        """The item numbers of the global batch of a step (counted from 0), int64 ``[size]``."""
        start = step % self.steps_per_epoch * self._size
        return self._permutation(self.epoch(step))[start : start + self._size]

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self._count))
        return self._drawn[1]
