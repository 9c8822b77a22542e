"""What every method provides.

A method is one paper's algorithm for one matrix: a class with the options it understands, the state it keeps, and a
step written as two generators. It knows a :class:`MatrixShard`, its state and its options; it does not know ZeRO,
DeepSpeed or process groups. Whatever must be summed over ranks it yields, and is sent the sum.

``project`` looks at the gradient and may not change the state; between the two, the optimizer decides on all ranks
whether every gradient was finite; ``update`` then changes the state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar

from ds_lowrank.methods.blocks.directions import Directions
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.sharding.matrix import MatrixShard, Side
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Update


class Method(ABC):
    """One low-rank method. Every class in ``ds_lowrank/methods`` that has a ``name`` is known under it."""

    name: ClassVar[str]
    Options: ClassVar[type[Options]]

    @staticmethod
    def side(shape: tuple[int, int], options: Any) -> Side:
        """Which dimension of a matrix is compressed."""
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
        """The rank that a matrix of this shape starts with. State may hold a smaller one, under ``rank``."""
        rank: int = min(options.rank, *shape)
        return rank

    @classmethod
    def rank_text(cls, shape: tuple[int, int], options: Any) -> str:
        """The rank as the role table shows it."""
        rank = cls.rank(shape, options)
        return f"{rank} (clipped from {options.rank})" if rank < options.rank else str(rank)

    @staticmethod
    def role_override(name: str, options: Any) -> tuple[bool, str] | None:
        """Whether a matrix of that name is stepped, and why, for a method that does not leave it to the patterns."""
        return None

    @staticmethod
    def missing_requirement(names: Collection[str], options: Any) -> str | None:
        """What is missing among the names of all parameters, and what to do about it; None where nothing is."""
        return None

    @staticmethod
    def unsupported_shape(shape: tuple[int, int], options: Any) -> str | None:
        """Why a matrix of this shape cannot be stepped with these options, and what would work; None where it can."""
        return None

    @staticmethod
    @abstractmethod
    def state(shard: MatrixShard, options: Any, rank: int) -> StateSpec:
        """What is kept for one matrix at that rank, except ``step``. Every number starts at zero."""

    @staticmethod
    def directions(shard: MatrixShard, state: State, options: Any, target: MatrixShard) -> Program[Directions]:
        """Along which directions a matrix is probed, for methods with a ``ascent``. Not asked for before a first step
        where the state has a ``basis``, which is not there yet.

        Args:
            state: as the last step left it.
            target: the elements that are to be moved: those of ``shard``, or the whole matrix.
        """
        raise NotImplementedError("a method without a climb has no directions")

    @staticmethod
    @abstractmethod
    def project(shard: MatrixShard, state: State, options: Any, step: int) -> Program[Any]:
        """Look at the gradient: find the basis of this step and project. Nothing is changed.

        Args:
            shard: holds this step's gradient, which need not be finite.
            state: as the last step left it; moments, which it has no use for, may be stored in fewer bits.
            options: the matrix's group, as it is now.
            step: 0 for the first step.

        Returns:
            A :class:`ProjectedGradient`.
        """

    @staticmethod
    @abstractmethod
    def update(shard: MatrixShard, state: State, options: Any, step: int, found: Any) -> Program[Update]:
        """Update the state and return the direction. ``found`` is finite, and not zero at ``step`` 0.

        Every tensor of the state is fp32 here, and is changed or replaced at will.
        """
