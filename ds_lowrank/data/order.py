"""The order in which finite data are visited: decided by the seed and the number of the step alone."""

import numpy as np
import numpy.typing as npt


class EpochOrder:
    """Global batches of `size` out of `count` items, in a new order each epoch, drawn from (seed, epoch).

    The last `count % size` items of an epoch's order are left to other epochs, so that no global batch straddles two.
    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        """`count` must be at least `size`."""
        self._count = count
        self._size = size
        self._seed = seed
        self.steps_per_epoch = count // size
        self._drawn: tuple[int, npt.NDArray[np.int64]] | None = None

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def items(self, step: int) -> npt.NDArray[np.int64]:
        """The global batch of a step, counted from 0: int64 `[size]`."""
        start = step % self.steps_per_epoch * self._size
        return self._permutation(self.epoch(step))[start : start + self._size]

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self._count))
        return self._drawn[1]
