"""The options that every method understands: the keys of ``optimizer.params`` in a DeepSpeed JSON."""

from __future__ import annotations

import math
from types import NoneType
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from ds_lowrank.linalg.quantization import FP32, BFloat16, Int8, Quantizer
from ds_lowrank.methods.blocks.ascent import Ascent
from ds_lowrank.methods.blocks.state_spec import TensorSpec
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.precision import MatmulPrecision

LARGEST = torch.finfo(torch.float32).max


class Options(BaseModel):
    """The options of one parameter group, validated; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fixed_on_resume: ClassVar[tuple[str, ...]] = (
        "proj_type",
        "state_dtype",
        "tensor_parallel_projection",
        "master_weights",
    )
    """The keys that decide what the stored numbers mean: a run can only be resumed with the same values."""

    rate_key: ClassVar[str | None] = "scale"
    """The key, in the methods that have it, which gives projected matrices a rate of their own; None for none."""

    lr: float = Field(1e-3, ge=0, allow_inf_nan=False)
    """The learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's, of projected matrices and of the other parameters; each in [0, 1)."""
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """Added to the root of the second moment."""
    eps_root: Literal["corrected", "uncorrected"] = "corrected"
    """Beside which root Adam's ``eps`` stands: that of the bias-corrected second moment, as in the paper of Adam, or
    that of the moment itself, as in the published codes of GaLore, APOLLO and Online Subspace Descent."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Decoupled, as in AdamW, of every parameter of the group."""
    weight_decay_order: Literal["before", "after"] = "before"
    """Whether weights decay before the update, as in AdamW, or after it, as in the published codes of GaLore, APOLLO,
    Online Subspace Descent, VLoRP and GradNormLoRP, where the update decays too."""
    lr_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the group's ``lr``; survives a scheduler that writes one ``lr`` into every group."""
    proj_type: Literal["std", "reverse_std", "left", "right"] = "std"
    """``std`` compresses the smaller dimension (columns if both are equal), ``reverse_std`` the other."""
    target_modules: tuple[str, ...] | None = None
    """Globs on parameter names. None: every matrix except embeddings and the output head."""
    exclude_modules: tuple[str, ...] = ()
    """Globs on parameter names that are not projected, also if ``target_modules`` matches them."""
    tensor_parallel_projection: Literal["logical", "local"] = "logical"
    """What is projected if tensor parallelism splits a matrix: the logical matrix, or each rank's shard on its own. The
    second is another algorithm at every tensor-parallel degree, and exchanges nothing between these ranks."""
    reduction: Literal["gradient", "projected"] = "gradient"
    """What is summed over data-parallel ranks and micro-batches at ZeRO 0: the gradient, or its projection, which each
    rank makes of its own gradient as soon as backward has it."""
    projected_gradient_clipping: float = Field(0.0, ge=0, allow_inf_nan=False)
    """With ``projected``: the largest norm of all projected gradients and of the gradients that are not projected,
    together; 0 for no clipping."""
    state_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """How moments are stored. Methods compute with them in fp32."""
    matmul_precision: MatmulPrecision | None = None
    """In which precision a card multiplies with gradients and weights: ``fp32``, or ``tf32``, which is several times as
    fast and keeps 10 bits of each factor. None leaves it to ``torch.set_float32_matmul_precision``."""
    master_weights: bool = Field(True, strict=True)
    """Whether weights in bf16 have fp32 copies, which DeepSpeed keeps. Without, they are stored in bf16 only, and each
    step rounds them stochastically, so that updates too small for bf16 add up nevertheless."""
    seed: int = Field(0, ge=0)
    """Of random sketches and projections."""

    @field_validator("*", mode="before")
    @classmethod
    def _read_numbers_as_json(cls, value: Any, info: ValidationInfo) -> Any:
        """Take numbers as JSON has them: a string or a boolean is none, and 200.0 is a whole number.

        Raises:
            ValueError: a number is needed and this is none, or none of fp32, in which the arithmetic is done.
        """
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if not {int, float} & kinds or not kinds <= {int, float, NoneType, Ellipsis}:
            return value
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, str | bool) for number in numbers):
            raise ValueError(f"Input should be a valid {'number' if float in kinds else 'integer'}")
        if float in kinds and any(isinstance(n, int | float) and LARGEST < abs(n) < math.inf for n in numbers):
            raise ValueError("Input should be a number that fp32 can hold")
        return int(value) if float not in kinds and isinstance(value, float) and value.is_integer() else value

    def model_post_init(self, context: Any) -> None:
        """Check what a single value cannot tell.

        Raises:
            ValueError: a beta is outside [0, 1).
        """
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.projected_gradient_clipping and self.reduction == "gradient":
            raise ValueError("projected_gradient_clipping belongs to reduction 'projected': remove it, or set that")

    def first_moment_spec(self, axis: Axis, columns: int) -> TensorSpec:
        """The spec of a moment that may be negative, stored in ``state_dtype``.

        Args:
            axis: the dimension of the matrix that the moment's rows belong to.
            columns: how many numbers each row has.
        """
        return TensorSpec(axis, columns, self._quantizer(signed=True))

    def second_moment_spec(self, axis: Axis, columns: int) -> TensorSpec:
        """The spec of a moment that is never negative, stored in ``state_dtype``.

        Args:
            axis: the dimension of the matrix that the moment's rows belong to.
            columns: how many numbers each row has.
        """
        return TensorSpec(axis, columns, self._quantizer(signed=False))

    def _quantizer(self, signed: bool) -> Quantizer:
        match self.state_dtype:
            case "bf16":
                return BFloat16()
            case "int8":
                return Int8(signed)
        return FP32

    @property
    def moment_block_rows(self) -> int:
        """How many consecutive rows of a moment must be on one rank, because they are quantized together."""
        return self._quantizer(signed=True).block_rows

    @property
    def block_rows(self) -> int:
        """The same of everything that the state of a matrix has."""
        return self.moment_block_rows

    @property
    def ascent(self) -> Ascent | None:
        """How to search for higher loss around the weights before the gradient is taken; None for no search."""
        return None

    @property
    def keeps_bases_gathered(self) -> bool:
        """Whether every rank keeps the rows of a basis that it computes with, and not only those it owns."""
        return self.reduction == "projected" or getattr(self, "basis_placement", "partitioned") == "replicated"

    @property
    def stores_indices(self) -> bool:
        """Whether a basis consists of columns of a fixed matrix, and only their indices are stored."""
        return getattr(self, "projector", None) == "dct"

    @property
    def adapters(self) -> dict[str, Any] | None:
        """The arguments of :func:`ds_lowrank.add_adapters` if the model is to have adapters; None if not."""
        return None

    @property
    def effective_lr(self) -> float:
        """The learning rate of this step, ``lr * lr_scale``."""
        return self.lr * self.lr_scale

    @property
    def decay(self) -> float:
        """The decoupled weight decay of this step: the weights are multiplied by one minus it."""
        return self.effective_lr * self.weight_decay

    @property
    def rate(self) -> float:
        """What the update is multiplied by: the learning rate, and the decay too where weights decay after it."""
        return self.effective_lr * (1 - self.decay if self.weight_decay_order == "after" else 1)

    def eps_at(self, step: int) -> float:
        """What Adam adds to the root of the corrected second moment.

        ``m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + e)`` with ``e = eps / sqrt(1 - beta2^t)`` is
        ``sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)``.

        Args:
            step: t, 1 for the first step.
        """
        return self.eps if self.eps_root == "corrected" else self.eps / math.sqrt(1 - self.betas[1] ** step)


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of, such as ``float`` of ``tuple[float, float]``."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}
