"""The inner optimizers: what turns a projected gradient into a direction.

GaLore (arXiv 2403.03507, Algorithm 1) leaves the rule rho open, and Online Subspace Descent (arXiv 2408.12857,
Algorithm 1) uses one for the weights and one for the basis. A rule works on rows along an axis, of which this rank owns
some; where a rule needs a sum over all rows it asks for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch

from ds_lowrank.linalg.moments import adam, rotate_first, rotate_second
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program, without_rounds

InnerOptimizerName = Literal["adamw", "adafactor", "lion", "sgd"]


class InnerOptimizer(ABC):
    """One optimizer's rule.

    Args:
        options: for ``betas``, ``eps`` and the dtype of the moments.
        prefix: of the keys in the state, so that a matrix can hold two rules.
        momentum: of SGD.
    """

    def __init__(self, options: Options, prefix: str = "", momentum: float = 0.0) -> None:
        self.options, self.prefix, self.momentum = options, prefix, momentum

    @abstractmethod
    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        """What the rule keeps for rows x columns along an axis of the matrix."""

    @abstractmethod
    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> Program[torch.Tensor]:
        """Update the state and return the direction to descend along.

        Args:
            gradient: owned rows x columns, fp32.
            step: 1 for the first step.

        Returns:
            owned rows x columns, fp32.
        """

    def rotate(self, state: State, rotation: torch.Tensor) -> None:
        """Carry the moments into another basis: old x new, old basis transposed times new basis."""
        raise NotImplementedError(f"{type(self).__name__} has no moments that a change of basis could carry")

    def _key(self, name: str) -> str:
        return self.prefix + name


class Adam(InnerOptimizer):
    """Kingma and Ba, Algorithm 1. Decoupled weight decay is the optimizer's."""

    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        return {
            self._key("exp_avg"): self.options.first_moment_spec(axis, columns),
            self._key("exp_avg_sq"): self.options.second_moment_spec(axis, columns),
        }

    @without_rounds
    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> torch.Tensor:
        first, second = state[self._key("exp_avg")], state[self._key("exp_avg_sq")]
        return adam(first, second, gradient, self.options.betas, self.options.eps, step)

    def rotate(self, state: State, rotation: torch.Tensor) -> None:
        rotate_first(state[self._key("exp_avg")], rotation)
        rotate_second(state[self._key("exp_avg_sq")], rotation)


class Lion(InnerOptimizer):
    """Chen et al., arXiv 2302.06675, Algorithm 2.

    ``interpolated`` is the direction before its sign is taken: the official code of Online Subspace Descent lifts that
    and takes the sign of the lifted matrix.
    """

    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        return {self._key("exp_avg"): self.options.first_moment_spec(axis, columns)}

    @without_rounds
    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> torch.Tensor:
        return self.interpolated(state, gradient).sign()

    def interpolated(self, state: State, gradient: torch.Tensor) -> torch.Tensor:
        beta1, beta2 = self.options.betas
        average = state[self._key("exp_avg")]
        mixed: torch.Tensor = average.lerp(gradient, 1 - beta1)
        average.lerp_(gradient, 1 - beta2)
        return mixed

    def rotate(self, state: State, rotation: torch.Tensor) -> None:
        rotate_first(state[self._key("exp_avg")], rotation)


class SGD(InnerOptimizer):
    """Plain, or with a heavy ball: ``b <- momentum * b + g``."""

    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        if self.momentum == 0:
            return {}
        return {self._key("momentum_buffer"): self.options.first_moment_spec(axis, columns)}

    @without_rounds
    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> torch.Tensor:
        if self.momentum == 0:
            return gradient
        buffer = state[self._key("momentum_buffer")]
        moved = torch.add(gradient, buffer, alpha=self.momentum)
        buffer.copy_(moved)
        return moved

    def rotate(self, state: State, rotation: torch.Tensor) -> None:
        if self.momentum:
            rotate_first(state[self._key("momentum_buffer")], rotation)


class Adafactor(InnerOptimizer):
    """Shazeer and Stern, arXiv 1804.04235, Algorithm 4, without relative step sizes and without a first moment.

    The second moment is kept as a mean for every row and one for every column.
    """

    TINY: ClassVar[float] = 1e-30
    """The paper's epsilon_1, added to the squares."""
    DECAY: ClassVar[float] = 0.8
    """``beta2`` of step t is ``1 - t^-0.8``."""
    CLIP: ClassVar[float] = 1.0
    """The paper's d: the root mean square that a direction may have."""

    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        return {
            self._key("row_mean"): TensorSpec(axis, 1),
            self._key("column_mean"): TensorSpec(shard.replicated_axis(columns), 1),
        }

    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> Program[torch.Tensor]:
        row_mean, column_mean = state[self._key("row_mean")], state[self._key("column_mean")]
        columns, new = gradient.shape[1], step**-self.DECAY
        small, one = shard.replicated_axis(columns), shard.replicated_axis(1)
        squares = gradient.square() + self.TINY
        row_mean.lerp_(squares.mean(1, keepdim=True), new)
        sums, total = yield (
            small.reduce_scatter(shard.local_contribution(squares.sum(0).unsqueeze(1))),
            one.reduce_scatter(shard.local_contribution(row_mean.sum().view(1, 1))),
        )
        column_mean.lerp_(sums / axis.size, new)
        means, total = yield small.all_gather(column_mean), one.all_gather(total)
        means, mean = shard.or_zeros(means, columns), shard.or_zeros(total, 1) / axis.size
        scaled = gradient * (mean / row_mean).sqrt() * means.T.rsqrt()
        total = yield from shard.replicated_sum(scaled.square().sum().view(1, 1))
        size = (total / (axis.size * columns)).sqrt()
        direction: torch.Tensor = scaled / (size / self.CLIP).clamp_min(1.0)
        return direction


INNER_OPTIMIZERS: dict[str, type[InnerOptimizer]] = {
    "adamw": Adam,
    "adam": Adam,
    "adafactor": Adafactor,
    "lion": Lion,
    "sgd": SGD,
}
"""By the names in ``inner`` and ``basis_optimizer``."""


def make_inner_optimizer(name: str, options: Any, prefix: str = "", momentum: float = 0.0) -> InnerOptimizer:
    """The rule of that name."""
    return INNER_OPTIMIZERS[name](options, prefix, momentum)
