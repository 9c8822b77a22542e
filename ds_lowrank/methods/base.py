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
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from ds_lowrank.linalg.codes import EXACT, BFloat16, Code, Int8
from ds_lowrank.methods.keep import Layout, Rows, State
from ds_lowrank.methods.probing import Directions
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.matrix import MatrixShard, Side, Update
from ds_lowrank.sharding.reduce import Program


class Options(BaseModel):
    """The keys of ``optimizer.params`` that every method understands."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    structure: ClassVar[tuple[str, ...]] = ("proj_type", "state_dtype", "tensor_parallel_projection")
    """The keys that decide what the numbers in the state are: a run can only be resumed with the same."""

    lr: float = Field(1e-3, ge=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    lr_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the group's ``lr``; survives a scheduler that writes one ``lr`` into every group."""
    proj_type: Literal["std", "reverse_std", "left", "right"] = "std"
    """``std`` compresses the smaller dimension (columns where both are equal), ``reverse_std`` the other."""
    target_modules: tuple[str, ...] | None = None
    """Globs on parameter names. None: every matrix but embeddings and the output head."""
    exclude_modules: tuple[str, ...] = ()
    tensor_parallel_projection: Literal["logical", "local"] = "logical"
    """What is projected where tensor parallelism splits a matrix: the matrix, or each rank's shard on its own, which is
    another algorithm at every tensor-parallel degree and sends nothing between these ranks."""
    state_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """How moments are stored. Methods compute on them in fp32."""
    seed: int = Field(0, ge=0)

    def model_post_init(self, _: Any) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")

    def average(self, axis: Axis, columns: int) -> Rows:
        """A moment of either sign along an axis."""
        return Rows(axis, columns, self._code(signed=True))

    def average_of_squares(self, axis: Axis, columns: int) -> Rows:
        """A moment that is never negative."""
        return Rows(axis, columns, self._code(signed=False))

    def _code(self, signed: bool) -> Code:
        match self.state_dtype:
            case "bf16":
                return BFloat16()
            case "int8":
                return Int8(signed)
        return EXACT

    @property
    def run(self) -> int:
        """Rows that must lie on one rank for the sake of how moments are stored."""
        return self._code(signed=True).run

    @property
    def climb(self) -> Climb | None:
        """How the loss around the weights is looked at; None where it is not."""
        return None

    @property
    def rate(self) -> float:
        """The learning rate of this step."""
        return self.lr * self.lr_scale


@dataclass
class Seen:
    """What ``project`` found.

    Attributes:
        projected: this rank's share of the projected gradient, fp32. Over all ranks it is finite and not zero where
            the gradient is.
        refreshed: whether a new basis (or projection) belongs to this step. ``update`` takes it back where it keeps
            the old one.
        size: about its largest magnitude, the same number on all ranks; zero exactly where all of it is. The optimizer
            fills it in before ``update``.
    """

    projected: torch.Tensor
    refreshed: bool
    size: float = 1.0

    @property
    def is_zero(self) -> bool:
        return self.size == 0

    @property
    def unit(self) -> float:
        """What to divide by before squaring, so that no square leaves the range of fp32."""
        return max(self.size, 1e-36) if self.size else 1.0


@dataclass(frozen=True)
class Climb:
    """How a method looks for higher loss around the weights before the gradient is taken; the same for all matrices.

    Attributes:
        probes: random directions a step.
        probe_radius: how far along each.
        radius: the norm of the perturbation, and where it is per matrix, of each matrix's.
        two_sided: whether each direction is tried on both sides.
        per_micro_batch: whether every micro-batch has a perturbation of its own.
    """

    probes: int
    probe_radius: float
    radius: float
    two_sided: bool
    per_matrix: bool
    per_micro_batch: bool


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
    def chooses(name: str, options: Any) -> tuple[bool, str] | None:
        """Whether a matrix of that name is stepped, and why, for a method that does not leave it to the patterns."""
        return None

    @staticmethod
    def lacks(names: Collection[str], options: Any) -> str | None:
        """What is missing among the names of all parameters, and what to do about it; None where nothing is."""
        return None

    @staticmethod
    def misfit(shape: tuple[int, int], options: Any) -> str | None:
        """Why a matrix of this shape cannot be stepped with these options, and what would work; None where it can."""
        return None

    @staticmethod
    @abstractmethod
    def state(shard: MatrixShard, options: Any, rank: int) -> Layout:
        """What is kept for one matrix at that rank, except ``step``. Every number starts at zero."""

    @staticmethod
    def directions(shard: MatrixShard, state: State, options: Any, target: MatrixShard) -> Program[Directions]:
        """Along which directions a matrix is probed, for methods with a ``climb``. Not asked for before a first step
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
            A :class:`Seen`.
        """

    @staticmethod
    @abstractmethod
    def update(shard: MatrixShard, state: State, options: Any, step: int, seen: Any) -> Program[Update]:
        """Update the state and return the direction. ``seen`` is finite, and not zero at ``step`` 0.

        Every tensor of the state is fp32 here, and is changed or replaced at will.
        """
