"""The inner optimizers, which turn a projected gradient into a direction.

GaLore (arXiv 2403.03507, Algorithm 1) leaves the choice of this rule, rho, open; Online Subspace Descent (arXiv
2408.12857, Algorithm 1) uses one rule for the weights and one for the basis. A rule works on the rows that this rank
owns along an axis of the matrix, and requests a collective if it needs a sum over all rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module
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
    """The update rule of an optimizer, for a tensor whose rows are spread over ranks.

    Args:
        options: provide ``betas``, ``eps`` and ``state_dtype``.
        prefix: prepended to the rule's keys in the state, so that a matrix can have two rules.
        momentum: the momentum of ``SGD``; other rules ignore it.
    """

    def __init__(self, options: Options, prefix: str = "", momentum: float = 0.0) -> None:
        self.options, self.prefix, self.momentum = options, prefix, momentum

    @abstractmethod
    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        """The state that the rule needs for a tensor with rows along an axis of the matrix.

        Args:
            shard: the stack.
            axis: the dimension of the matrix along which the tensor has its rows.
            columns: how many columns the tensor has.

        Returns:
            The tensors to store, by their keys.
        """

    @abstractmethod
    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> Program[torch.Tensor]:
        """Update the rule's state in place, and return the direction to descend along.

        Args:
            shard: the stack.
            axis: the dimension along which the gradient has its rows.
            state: the stack's state, with the rule's tensors as fp32.
            gradient: matrices x owned rows x columns, fp32.
            step: 1 for the first step.

        Returns:
            The direction, matrices x owned rows x columns, fp32. The weights move against it.
        """

    def rotate(self, state: State, rotation: torch.Tensor) -> None:
        """Carry the moments from one basis into another, in place.

        Args:
            state: the stack's state.
            rotation: the old basis transposed times the new one, matrices x old rank x new rank, fp32.

        Raises:
            NotImplementedError: the rule has no moments that could be carried.
        """
        raise NotImplementedError(f"{type(self).__name__} has no moments that a change of basis could carry")

    def _key(self, name: str) -> str:
        return self.prefix + name


class Adam(InnerOptimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980, Algorithm 1). The optimizer applies decoupled weight decay itself."""

    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        """Adam's two moments, ``exp_avg`` and ``exp_avg_sq``, rows x columns each."""
        return {
            self._key("exp_avg"): self.options.first_moment_spec(axis, columns),
            self._key("exp_avg_sq"): self.options.second_moment_spec(axis, columns),
        }

    @without_rounds
    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> torch.Tensor:
        """``m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``: matrices x owned rows x columns, fp32.

        Exchanges nothing.
        """
        first, second = state[self._key("exp_avg")], state[self._key("exp_avg_sq")]
        return adam(first, second, gradient, self.options.betas, self.options.eps_at(step), step)

    def rotate(self, state: State, rotation: torch.Tensor) -> None:
        """Carry both moments into another basis: ``M <- M C`` and ``V <- V (C * C)`` with the rotation C."""
        rotate_first(state[self._key("exp_avg")], rotation)
        rotate_second(state[self._key("exp_avg_sq")], rotation)


class Lion(InnerOptimizer):
    """Lion (Chen et al., arXiv 2302.06675, Algorithm 2): the sign of an interpolated momentum."""

    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        """Lion's momentum, ``exp_avg``, rows x columns."""
        return {self._key("exp_avg"): self.options.first_moment_spec(axis, columns)}

    @without_rounds
    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> torch.Tensor:
        """``sign(beta1 m + (1 - beta1) g)``, matrices x owned rows x columns, fp32. Exchanges nothing."""
        return self.interpolated(state, gradient).sign()

    def interpolated(self, state: State, gradient: torch.Tensor) -> torch.Tensor:
        """Update the momentum, and return Lion's direction before its sign is taken.

        The official code of Online Subspace Descent lifts this and takes the sign of the lifted matrix.

        Args:
            state: the stack's state, with the momentum m, which becomes ``beta2 m + (1 - beta2) g``.
            gradient: g, matrices x owned rows x columns, fp32.

        Returns:
            ``beta1 m + (1 - beta1) g`` with the momentum before its update, matrices x owned rows x columns, fp32.
        """
        beta1, beta2 = self.options.betas
        momentum = state[self._key("exp_avg")]
        interpolated: torch.Tensor = momentum.lerp(gradient, 1 - beta1)
        momentum.lerp_(gradient, 1 - beta2)
        return interpolated

    def rotate(self, state: State, rotation: torch.Tensor) -> None:
        """Carry the momentum into another basis: ``M <- M C`` with the rotation C."""
        rotate_first(state[self._key("exp_avg")], rotation)


class SGD(InnerOptimizer):
    """Gradient descent, plain or with heavy-ball momentum."""

    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        """``momentum_buffer``, rows x columns, if there is momentum; else nothing."""
        if self.momentum == 0:
            return {}
        return {self._key("momentum_buffer"): self.options.first_moment_spec(axis, columns)}

    @without_rounds
    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> torch.Tensor:
        """The gradient, or with momentum ``b <- momentum * b + g``: matrices x owned rows x columns, fp32.

        Exchanges nothing.
        """
        if self.momentum == 0:
            return gradient
        buffer = state[self._key("momentum_buffer")]
        updated = torch.add(gradient, buffer, alpha=self.momentum)
        buffer.copy_(updated)
        return updated

    def rotate(self, state: State, rotation: torch.Tensor) -> None:
        """Carry the momentum buffer, if there is one, into another basis: ``B <- B C`` with the rotation C."""
        if self.momentum:
            rotate_first(state[self._key("momentum_buffer")], rotation)


class Adafactor(InnerOptimizer):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235, Algorithm 4), without relative step sizes and first moment.

    The second moment is stored as the mean of every row and of every column.
    """

    TINY: ClassVar[float] = 1e-30
    """The paper's epsilon_1, added to the squared gradient."""
    DECAY: ClassVar[float] = 0.8
    """The exponent of the paper's schedule: beta2 of step t is ``1 - t^-0.8``."""
    CLIP: ClassVar[float] = 1.0
    """The paper's d: the largest root mean square of a direction."""

    def state(self, shard: MatrixShard, axis: Axis, columns: int) -> StateSpec:
        """``row_mean``, rows x 1, and ``column_mean``, columns x 1, both fp32."""
        return {
            self._key("row_mean"): TensorSpec(axis, 1),
            self._key("column_mean"): TensorSpec(shard.replicated_axis(columns), 1),
        }

    def direction(
        self, shard: MatrixShard, axis: Axis, state: State, gradient: torch.Tensor, step: int
    ) -> Program[torch.Tensor]:
        """``g / sqrt(V)`` with the factored V, clipped to a root mean square of d.

        The result is matrices x owned rows x columns, fp32.
        """
        row_mean, column_mean = state[self._key("row_mean")], state[self._key("column_mean")]
        columns, new_share = gradient.shape[2], step**-self.DECAY
        column_axis, scalar_axis = shard.replicated_axis(columns), shard.replicated_axis(1)
        squares = gradient.square() + self.TINY
        row_mean.lerp_(squares.mean(2, keepdim=True), new_share)
        sums, total = yield (
            column_axis.reduce_scatter(shard.local_contribution(squares.sum(1).unsqueeze(2))),
            scalar_axis.reduce_scatter(shard.local_contribution(row_mean.sum((1, 2), keepdim=True))),
        )
        column_mean.lerp_(sums / axis.size, new_share)
        means, total = yield column_axis.all_gather(column_mean), scalar_axis.all_gather(total)
        means, mean = shard.or_zeros(means, columns), shard.or_zeros(total, 1) / axis.size
        scaled = gradient * (mean / row_mean).sqrt() * means.mT.rsqrt()
        total = yield from shard.replicated_sum(scaled.square().sum((1, 2), keepdim=True))
        root_mean_square = (total / (axis.size * columns)).sqrt()
        direction: torch.Tensor = scaled / (root_mean_square / self.CLIP).clamp_min(1.0)
        return direction


INNER_OPTIMIZERS: dict[str, type[InnerOptimizer]] = {
    "adamw": Adam,
    "adam": Adam,
    "adafactor": Adafactor,
    "lion": Lion,
    "sgd": SGD,
}
"""The class of every inner optimizer, by its name in the options ``inner`` and ``basis_optimizer``."""


def make_inner_optimizer(name: str, options: Any, prefix: str = "", momentum: float = 0.0) -> InnerOptimizer:
    """Make the inner optimizer of a name.

    Args:
        name: a key of ``INNER_OPTIMIZERS``, or ``package.module:Class``.
        options: provide ``betas``, ``eps`` and ``state_dtype``.
        prefix: prepended to the rule's keys in the state, so that a matrix can have two rules.
        momentum: the momentum of ``sgd``; other rules ignore it.

    Raises:
        ValueError: there is no inner optimizer of that name. Options are validated before.
    """
    return (INNER_OPTIMIZERS.get(name) or own_rule(name))(options, prefix, momentum)


@cache
def own_rule(path: str) -> type[InnerOptimizer]:
    """Import a rule that is not part of this package.

    Args:
        path: ``package.module:Class``; the module can be imported where the run starts.

    Raises:
        ValueError: the module cannot be imported, or has no such subclass of :class:`InnerOptimizer`; says which.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(
            f"{module!r} cannot be imported ({error}): install its package, or add its folder to PYTHONPATH"
        ) from error
    if found is None:
        raise ValueError(f"the module {module!r} has no {name!r}")
    if not (isinstance(found, type) and issubclass(found, InnerOptimizer)):
        raise ValueError(f"{path!r} is not a subclass of {InnerOptimizer.__module__}.InnerOptimizer")
    if missing := ", ".join(sorted(found.__abstractmethods__)):
        raise ValueError(f"{path!r} does not define {missing}")
    return found
