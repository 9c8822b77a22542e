"""What later steps of a run are compared with: the moving average of the gradient norm, and the lowest loss."""

from __future__ import annotations

import math
from typing import Any

DECAY = 0.98
"""Of the moving average per step: about the last 50 steps count."""
SETTLED = 50
"""The average of fewer norms is not yet one to judge a norm by."""


class Course:
    """The losses and gradient norms of a run so far. Numbers that are not finite leave no trace.

    Attributes:
        norms: how many norms there have been.
        lowest_loss: of all steps, the mean over micro-batches and ranks; infinite before the first.
    """

    def __init__(self) -> None:
        self.norms = 0
        self.lowest_loss = math.inf
        self._sum = self._weight = 0.0

    def add_norm(self, norm: float | None) -> float | None:
        """Note a step's gradient norm.

        The average is exponential and corrected for its start, as a moment of Adam is: after norms ``n_1 .. n_k`` it is
        ``sum d^(k - i) n_i / sum d^(k - i)`` with d = 0.98.

        Args:
            norm: before clipping; None if it was not computed.

        Returns:
            The norm over the average of those of earlier steps; None before there are any, and for a norm that is not
            finite.
        """
        if norm is None or not math.isfinite(norm):
            return None
        ratio = norm * self._weight / self._sum if self._sum else None
        self._sum, self._weight = DECAY * self._sum + norm, DECAY * self._weight + 1
        self.norms += 1
        return ratio

    def add_loss(self, loss: float) -> None:
        """Note a step's loss.

        Args:
            loss: mean over micro-batches and ranks.
        """
        if math.isfinite(loss):
            self.lowest_loss = min(self.lowest_loss, loss)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        lowest = None if math.isinf(self.lowest_loss) else self.lowest_loss
        return {"norms": self.norms, "sum": self._sum, "weight": self._weight, "lowest_loss": lowest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: what :meth:`state_dict` returned.
        """
        self.norms, self._sum, self._weight = state["norms"], state["sum"], state["weight"]
        self.lowest_loss = math.inf if state["lowest_loss"] is None else state["lowest_loss"]
