"""What every method provides.

A method is one paper's algorithm: a class with the options it understands, the state it keeps, and a step written as
two generators. It steps a stack of matrices that are cut alike, with a leading dimension for them in every tensor, and
reads like the step of one. It knows a :class:`MatrixShard`, its state and its options; it knows neither ZeRO nor
DeepSpeed nor process groups. Whatever must be summed over ranks it yields, and is sent the sum.

``project`` looks at the gradient and may not change the state. Between the two, the optimizer decides on all ranks
whether every gradient was finite. ``update`` then changes the state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable
from typing import Any, ClassVar

from ds_lowrank.methods.blocks.directions import Directions
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.sharding.matrix import MatrixShard, Side, Sums
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Update

__all__ = [
    "METHODS",
    "Method",
    "Options",
    "PerturbingMethod",
    "ProjectedGradient",
    "State",
    "StateSpec",
    "Sums",
    "TensorSpec",
]

METHODS: dict[str, type[Method]] = {}
"""Every method by its name in ``optimizer.type``: those of this package, and any other that was imported."""


class Method(ABC):
    """One low-rank method.

    A subclass with a ``name`` is registered under it when it is defined, in this package or in any other.

    Attributes:
        name: in ``optimizer.type``.
        Options: the pydantic model of its options.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the method.

        Raises:
            TypeError: another method has that name.
        """
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        known = METHODS.get(cls.name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"two methods are called {cls.name!r}: {known.__module__}.{known.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}; give one of them another name"
            )
        METHODS[cls.name] = cls

    @staticmethod
    def side(shape: tuple[int, int], options: Any) -> Side:
        """Which dimension of a matrix is compressed, by ``proj_type``."""
        tall = shape[0] >= shape[1]
        match options.proj_type:
            case "std":
                return "right" if tall else "left"
            case "reverse_std":
                return "left" if tall else "right"
            case "left":
                return "left"
        return "right"

    @staticmethod
    def rank(shape: tuple[int, int], options: Any) -> int:
        """The rank that a matrix of this shape starts with. Its state may hold another one, under ``rank``.

        0 for a method without an option ``rank``: it has no subspace.
        """
        rank: int = min(getattr(options, "rank", 0), *shape)
        return rank

    @classmethod
    def rank_text(cls, shape: tuple[int, int], options: Any) -> str:
        """The rank as the role table shows it; a dash where there is none."""
        rank = cls.rank(shape, options)
        asked = getattr(options, "rank", rank)
        return f"{rank} (clipped from {asked})" if rank < asked else str(rank or "-")

    @staticmethod
    def role_override(name: str, options: Any) -> tuple[bool, str] | None:
        """Decide the role of the matrix of that name: (projected, reason), or None to leave it to the patterns."""
        return None

    @staticmethod
    def missing_requirement(names: Collection[str], options: Any) -> str | None:
        """What the model lacks, judged by the names of all parameters, and what to do about it; None if nothing."""
        return None

    @staticmethod
    def unsupported_shape(shape: tuple[int, int], options: Any) -> str | None:
        """Why a matrix of this shape cannot be stepped with these options, and what would work; None if it can."""
        return None

    @staticmethod
    def phase(name: str, step: int, options: Any) -> Hashable:
        """What, besides the numbers in their states, tells apart matrices that cannot be stepped together.

        Args:
            name: of a matrix.
            step: the number of steps so far.
            options: of the matrix's group, as they are now.
        """
        return None

    @staticmethod
    @abstractmethod
    def state(shard: MatrixShard, options: Any, rank: int) -> StateSpec:
        """What is kept for each matrix at that rank, in addition to ``step``. Every number starts at zero."""

    @staticmethod
    def needs_gradient(options: Any) -> str | None:
        """Why these options do not go with ``reduction`` ``projected``, and what does; None if they do.

        They do if an ordinary step needs of the gradient no more than :meth:`measure` returns.
        """
        return "its class does not say what an ordinary step needs of a gradient: leave reduction at 'gradient'"

    @staticmethod
    def factors(shard: MatrixShard, state: State, options: Any) -> Program[Sums | None]:
        """What the next gradients are to be multiplied by, under ``reduction`` ``projected``.

        Args:
            shard: holds the weights, and no gradients yet.
            state: as the last step left it; not changed.
            options: of the matrices' group, as they are now.

        Returns:
            Tensors with a leading dimension for the matrices, the same until the next step; None if that step needs
            the gradients themselves, for a new basis.
        """
        raise NotImplementedError

    @staticmethod
    def measure(shard: MatrixShard, options: Any, factors: Sums) -> Sums:
        """What an ordinary step needs of the gradients, all linear in them: unless a method says more, ``H Q``.

        It is called in the middle of backward, once a gradient is there, and summed over micro-batches. ``project``
        finds the sums in ``shard.sums``, and sums them over ranks.

        Args:
            shard: holds the gradients of a micro-batch, not reduced over data-parallel ranks.
            options: of the matrices' group.
            factors: what :meth:`factors` returned for these matrices.
        """
        return (shard.times(factors[0]),)

    @staticmethod
    @abstractmethod
    def project(shard: MatrixShard, state: State, options: Any) -> Program[Any]:
        """Look at the gradient: find the basis of this step and project. Nothing is changed.

        Args:
            shard: holds this step's gradients, which need not be finite.
            state: as the last step left it, with ``step``, the number of steps so far. Moments, which this half has no
                use for, may be quantized. Integers are the same for all matrices of the stack.
            options: of the matrices' group, as they are now.

        Returns:
            A :class:`ProjectedGradient`.
        """

    @staticmethod
    @abstractmethod
    def update(shard: MatrixShard, state: State, options: Any, found: Any) -> Program[Update]:
        """Update the state and return the direction.

        Args:
            shard: holds this step's gradients.
            state: every tensor is fp32, and may be changed or replaced. ``step`` is the number of steps so far. A list
                of integers, one for each matrix, may replace an integer.
            options: of the matrices' group, as they are now.
            found: what ``project`` returned: finite, and not zero in the first step.
        """


class PerturbingMethod(Method):
    """A method that takes its gradient where the loss is higher: its options have an ``ascent``."""

    @staticmethod
    @abstractmethod
    def directions(shard: MatrixShard, state: State, options: Any, target: MatrixShard) -> Program[Directions]:
        """Along which directions a matrix is probed.

        If the state has a ``basis``, this is not called before the first step, when there is none yet.

        Args:
            shard: the matrix.
            state: as the last step left it.
            options: of the matrix's group, as they are now.
            target: the elements that are to be moved: those of ``shard``, or the whole matrix.
        """
