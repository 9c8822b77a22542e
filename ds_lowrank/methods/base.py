"""What every method provides.

A method is one paper's algorithm for one matrix: a class with the options it understands, the state it keeps, and a
step written as two generators. It knows a :class:`MatrixShard`, its state and its options; it does not know ZeRO,
DeepSpeed or process groups. Whatever must be summed over ranks it yields, and is sent the sum.

``project`` looks at the gradient and may not change the state; between the two, the optimizer decides on all ranks
whether every gradient was finite; ``update`` then changes the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from ds_lowrank.sharding.matrix import Factors, MatrixShard, Side
from ds_lowrank.sharding.reduce import Program

State = dict[str, Any]
"""Tensors and ints under fixed keys. ``step`` (the optimizer's) is always there."""


class Options(BaseModel):
    """The keys of ``optimizer.params`` that every method understands."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(1e-3, ge=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    lr_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the group's ``lr``; survives a scheduler that writes one ``lr`` into every group."""
    target_modules: tuple[str, ...] | None = None
    """Globs on parameter names. None: every matrix but embeddings and the output head."""
    exclude_modules: tuple[str, ...] = ()
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0)

    def model_post_init(self, _: Any) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")

    @property
    def moment_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.state_dtype == "bf16" else torch.float32


@dataclass
class Projection:
    """What ``project`` found.

    Attributes:
        own: owned compressed rows x rank: this rank's rows of the basis.
        basis: held compressed rows x rank, fp32: the rows of the basis that this rank computes with.
        projected: owned kept rows x rank, fp32: this rank's rows of ``R = H Q``.
        is_zero: whether the whole ``R`` is zero; filled in by the optimizer before ``update``.
    """

    own: torch.Tensor
    basis: torch.Tensor
    projected: torch.Tensor
    is_zero: bool = False


class Method(Protocol):
    """One low-rank method."""

    name: ClassVar[str]
    Options: ClassVar[type[Options]]

    @staticmethod
    def side(shape: tuple[int, int], options: Any) -> Side:
        """Which dimension of a matrix is compressed."""

    @staticmethod
    def rank(shape: tuple[int, int], options: Any) -> int:
        """The rank that a matrix of this shape gets."""

    @staticmethod
    def init_state(shard: MatrixShard, options: Any, device: torch.device) -> State:
        """The state of one matrix on this rank, complete from the start, except ``step``."""

    @staticmethod
    def project(shard: MatrixShard, state: State, options: Any, step: int) -> Program[Projection]:
        """Find the basis of this step and project the gradient. Nothing is changed.

        Args:
            shard: holds this step's gradient, which need not be finite.
            state: as the last step left it.
            options: the matrix's group, as it is now.
            step: 0 for the first step.
        """

    @staticmethod
    def update(shard: MatrixShard, state: State, options: Any, step: int, seen: Projection) -> Program[Factors]:
        """Update the state, in place, and return the direction. ``seen`` is finite, and not zero at ``step`` 0."""
