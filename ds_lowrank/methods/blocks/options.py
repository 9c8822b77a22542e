from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ds_lowrank.linalg.quantization import FP32, BFloat16, Int8, Quantizer
from ds_lowrank.methods.blocks.state_spec import TensorSpec
from ds_lowrank.sharding.axis import Axis


class Options(BaseModel):
    """The keys of ``optimizer.params`` that every method understands."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fixed_on_resume: ClassVar[tuple[str, ...]] = ("proj_type", "state_dtype", "tensor_parallel_projection")
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

    def first_moment_spec(self, axis: Axis, columns: int) -> TensorSpec:
        """A moment of either sign along an axis."""
        return TensorSpec(axis, columns, self._quantizer(signed=True))

    def second_moment_spec(self, axis: Axis, columns: int) -> TensorSpec:
        """A moment that is never negative."""
        return TensorSpec(axis, columns, self._quantizer(signed=False))

    def _quantizer(self, signed: bool) -> Quantizer:
        match self.state_dtype:
            case "bf16":
                return BFloat16()
            case "int8":
                return Int8(signed)
        return FP32

    @property
    def block_rows(self) -> int:
        """Rows that must lie on one rank for the sake of how moments are stored."""
        return self._quantizer(signed=True).block_rows

    @property
    def ascent(self) -> Ascent | None:
        """How the loss around the weights is looked at; None where it is not."""
        return None

    @property
    def effective_lr(self) -> float:
        """The learning rate of this step."""
        return self.lr * self.lr_scale


@dataclass(frozen=True)
class Ascent:
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
