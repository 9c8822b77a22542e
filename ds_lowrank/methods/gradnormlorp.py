"""GradNormLoRP (Huang et al., arXiv 2412.19616): weights in magnitude and direction, projected gradients.

Every unit of a weight matrix (a row, or a column) is ``W = g v / |v|`` with a learned magnitude g and direction v. From
the gradient ``G`` of W, with ``u = v / |v|``:

    dL/dg = <G, u>
    dL/dv = (g / |v|) (G - <G, u> u)         (Salimans and Kingma, arXiv 1602.07868, Equation 3)
    g <- g - lr * Adam(dL/dg)
    v <- v - lr * scale * N Q^T              N and Q are GaLore's, of dL/dv
    W <- g v / |v|

Only W, g and ``|v|`` are kept: v is W in another length. That is ``parametrization`` ``full``. With ``adapter`` the
model itself computes ``W = g (W0 + B A) / |W0 + B A|`` (:mod:`ds_lowrank.adapters.model`), and what is left is GaLore
on the gradients of A and B.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.inner_optimizers import Adam
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.subspace import Projection, subspace_state
from ds_lowrank.methods.galore import GaLore, GaLoreOptions
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Factors, NewWeights, Update

ADAPTER_KEYS = ("adapter_rank", "adapter_alpha", "adapter_dropout", "modules_to_save")
ADAPTER_FACTORS = ("lora_A", "lora_B")


class GradNormLoRPOptions(GaLoreOptions):
    """The paper's keys beside GaLore's."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*GaLoreOptions.fixed_on_resume, "parametrization", "norm_axis")

    update_proj_gap: int = Field(250, gt=0, strict=True)
    parametrization: Literal["full", "adapter"] = "full"
    norm_axis: Literal["output", "input"] = "output"
    """What has a magnitude: each output unit, a row of ``torch.nn.Linear``'s weight, or each input unit, a column."""
    adapter_rank: int = Field(8, gt=0, strict=True)
    """Columns of B and rows of A."""
    adapter_alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    """``B A`` counts ``adapter_alpha / adapter_rank`` times."""
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """On the input of the adapter's path."""
    modules_to_save: tuple[str, ...] | None = None
    """Globs of modules that are trained as they are beside the adapters. None: new task heads."""

    def model_post_init(self, context: object) -> None:
        super().model_post_init(context)
        for key in ADAPTER_KEYS:
            if self.parametrization == "full" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} belongs to parametrization 'adapter': remove it, or set that")

    @property
    def magnitude_optimizer(self) -> Adam:
        return Adam(self, prefix="magnitude_")


@dataclass
class TangentProjection(Projection):
    """A projection of the direction's gradient.

    Attributes:
        lengths, along: owned units x 1: ``|W|`` and dL/dg.
        stretch: held units x 1: ``v`` over ``W``.
    """

    lengths: torch.Tensor = field(kw_only=True)
    along: torch.Tensor = field(kw_only=True)
    stretch: torch.Tensor = field(kw_only=True)


class GradNormLoRP(Method):
    """GradNormLoRP on one matrix: a whole weight, or a factor of an adapter."""

    name: ClassVar[str] = "GradNormLoRP"
    Options: ClassVar[type[GradNormLoRPOptions]] = GradNormLoRPOptions

    @staticmethod
    def role_override(name: str, options: GradNormLoRPOptions) -> tuple[bool, str] | None:
        if options.parametrization == "full":
            return None
        return (True, "adapter") if is_factor(name) else (False, "no adapter")

    @staticmethod
    def missing_requirement(names: Collection[str], options: GradNormLoRPOptions) -> str | None:
        found = any(map(is_factor, names))
        if options.parametrization == "adapter" and not found:
            return "parametrization 'adapter' needs a model with adapters: call ds_lowrank.add_adapters(model) first"
        if options.parametrization == "full" and found:
            return "the model has adapters, and parametrization is 'full': set it to 'adapter', or leave them out"
        return None

    @staticmethod
    def state(shard: MatrixShard, options: GradNormLoRPOptions, rank: int) -> StateSpec:
        layout = subspace_state(shard, options, rank)
        if options.parametrization == "adapter":
            return layout
        axis = units(shard, options)
        magnitudes = {"magnitude": TensorSpec(axis, 1), "direction_norm": TensorSpec(axis, 1)}
        return {**layout, **magnitudes, **options.magnitude_optimizer.state(shard, axis, 1)}

    @staticmethod
    def project(shard: MatrixShard, state: State, options: GradNormLoRPOptions, step: int) -> Program[Projection]:
        if options.parametrization == "adapter":
            return (yield from GaLore.project(shard, state, options, step))
        axis = units(shard, options)
        squares, dots = yield (
            axis.reduce_scatter(shard.squares_along(axis, shard.weights)),
            axis.reduce_scatter(shard.dots_along(axis, shard.flat_gradient, shard.weights)),
        )
        lengths = squares.sqrt()
        magnitude = lengths if step == 0 else state["magnitude"]
        direction_norm = lengths if step == 0 else state["direction_norm"]
        # A unit of zeros has no direction: its weight is v itself, its gradient is not changed.
        zero = lengths == 0
        sign = torch.where(magnitude < 0, -1.0, 1.0)
        held = yield axis.all_gather(
            torch.cat(
                [
                    torch.where(zero, 1.0, magnitude / direction_norm),
                    torch.where(zero, 0.0, dots / squares),
                    torch.where(zero, 1.0, sign * direction_norm / lengths),
                ],
                dim=1,
            )
        )
        slope, radial, stretch = held.split(1, dim=1)
        shard.with_gradient(lambda pieces: tangent(shard, axis, pieces, slope, radial))
        found = yield from GaLore.project(shard, state, options, step)
        along = torch.where(zero, 0.0, sign * dots / lengths)
        return TangentProjection(**vars(found), lengths=lengths, along=along, stretch=stretch)

    @staticmethod
    def update(
        shard: MatrixShard, state: State, options: GradNormLoRPOptions, step: int, found: Projection
    ) -> Program[Update]:
        moved = yield from GaLore.update(shard, state, options, step, found)
        if not isinstance(found, TangentProjection):
            return moved
        if step == 0:
            state["magnitude"].copy_(found.lengths)
            state["direction_norm"].copy_(found.lengths)
        axis, rate = units(shard, options), options.effective_lr
        change = yield from options.magnitude_optimizer.direction(shard, axis, state, found.along, step + 1)
        if rate == 0:
            return NewWeights(shard.weights.float)
        kept = 1 - rate * options.weight_decay
        magnitude = kept * state["magnitude"] - rate * change
        direction = Direction(shard, axis, found.stretch * kept, moved, rate)
        squares = yield axis.reduce_scatter(shard.squares_along(axis, direction.flat()))
        direction_norm = squares.sqrt()
        # A unit that was zero takes the length that its plain step gave it.
        magnitude = torch.where(found.lengths == 0, direction_norm, magnitude)
        state["magnitude"].copy_(magnitude)
        state["direction_norm"].copy_(direction_norm)
        factor = yield axis.all_gather(torch.where(direction_norm > 0, magnitude / direction_norm, 0.0))
        return NewWeights(lambda: direction.flat(factor))


def is_factor(name: str) -> bool:
    """Whether a parameter is an adapter's A or B."""
    return name.rpartition(".")[2] in ADAPTER_FACTORS


def units(shard: MatrixShard, options: GradNormLoRPOptions) -> Axis:
    """The dimension along which the magnitudes lie."""
    return shard.rows if options.norm_axis == "output" else shard.columns


def tangent(
    shard: MatrixShard, axis: Axis, pieces: list[torch.Tensor], slope: torch.Tensor, radial: torch.Tensor
) -> list[torch.Tensor]:
    """dL/dv for each rectangle of the gradient, fp32.

    Args:
        slope: held units x 1: ``g / |v|``.
        radial: held units x 1: ``<G, W> / |W|^2``.
    """
    changed = []
    for rectangle, gradient, weight in zip(shard.part.rectangles, pieces, shard.views(shard.weights), strict=True):
        across = gradient.float() - shard.along(axis, rectangle, radial) * weight.float()
        changed.append(across.mul_(shard.along(axis, rectangle, slope)))
    return changed


@dataclass(frozen=True)
class Direction:
    """``v`` after its step, computed when it is asked for: ``stretch * W - rate * update``.

    Attributes:
        stretch: held units x 1.
    """

    shard: MatrixShard
    axis: Axis
    stretch: torch.Tensor
    update: Factors | Dense
    rate: float

    def flat(self, factor: torch.Tensor | None = None) -> torch.Tensor:
        """On the elements that this rank holds, fp32; times ``factor``, held units x 1."""
        shard = self.shard
        moved = shard.dense(self.update).mul_(-self.rate)
        for rectangle, piece, weight in zip(
            shard.part.rectangles, shard.views(moved), shard.views(shard.weights), strict=True
        ):
            piece.addcmul_(shard.along(self.axis, rectangle, self.stretch), weight.float())
            if factor is not None:
                piece.mul_(shard.along(self.axis, rectangle, factor))
        return moved
