"""GradNormLoRP (Huang et al., arXiv 2412.19616): weights in magnitude and direction, projected gradients.

Every unit of a weight matrix (a row, or a column) is ``W = g v / |v|`` with a learned magnitude g and direction v. With
``G`` the gradient of W and ``u = v / |v|``:

    dL/dg = <G, u>
    dL/dv = (g / |v|) (G - <G, u> u)         (Salimans and Kingma, arXiv 1602.07868, Equation 3)
    g <- g - lr * Adam(dL/dg)
    v <- v - lr * scale * N Q^T              N and Q are GaLore's, of dL/dv
    W <- g v / |v|

Only W, g and ``|v|`` are stored. As ``W = g v / |v|``, the direction is ``v = sign(g) |v| / |W| * W``, and with
``a = <G, W> / |W|^2``:

    dL/dg = sign(g) <G, W> / |W|
    dL/dv = g / |v| * (G - a W)

A unit of zeros has no direction: there ``v = W`` and ``dL/dv = G``, and its magnitude becomes the norm of what its step
makes of it.

That is ``parametrization`` ``full``. With ``adapter`` the model itself computes ``W = g (W0 + B A) / |W0 + B A|``
(:mod:`ds_lowrank.adapters`), and what is left is GaLore on the gradients of A and B.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.inner_optimizers import Adam
from ds_lowrank.methods.blocks.projection import safe_ratio
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.subspace import Projection
from ds_lowrank.methods.blocks.weight_norm import Frame, MovedDirections, Tangent, gather_frame
from ds_lowrank.methods.galore import GaLoreMethod, GaLoreOptions, galore_state
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.elementwise import dots, squared_norms, sum_of_squares
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import NewWeights, Update

ADAPTER_KEYS = ("adapter_rank", "adapter_alpha", "adapter_dropout", "detach_norm", "modules_to_save")
SHARED_KEYS = ("norm_axis", "seed", "target_modules", "exclude_modules")
ADAPTER_FACTORS = ("lora_A", "lora_B")


class GradNormLoRPOptions(GaLoreOptions):
    """The keys of GradNormLoRP, in addition to GaLore's."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*GaLoreOptions.fixed_on_resume, "parametrization", "norm_axis")

    update_proj_gap: int = Field(250, gt=0, strict=True)
    """T, in optimizer steps."""
    parametrization: Literal["full", "adapter"] = "full"
    """The weight itself as magnitude and direction, or adapters on a frozen weight."""
    norm_axis: Literal["output", "input"] = "output"
    """What has a magnitude: each output unit, a row of ``torch.nn.Linear``'s weight, or each input unit, a column."""
    adapter_rank: int = Field(8, gt=0, strict=True)
    """Columns of B and rows of A."""
    adapter_alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    """``B A`` is scaled by ``adapter_alpha / adapter_rank``."""
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the adapter's path."""
    detach_norm: bool = Field(False, strict=True)
    """Adapters: whether ``|W0 + B A|`` counts as a constant in the backward pass, as in peft's DoRA."""
    modules_to_save: tuple[str, ...] | None = None
    """Globs of modules that are trained as they are, next to the adapters. None: new task heads."""

    def model_post_init(self, context: object) -> None:
        """Refuse options of adapters without adapters."""
        super().model_post_init(context)
        for key in ADAPTER_KEYS:
            if self.parametrization == "full" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} belongs to parametrization 'adapter': remove it, or set that")

    @property
    def adapters(self) -> dict[str, Any] | None:
        """The arguments of :func:`ds_lowrank.add_adapters` if the model is to have adapters."""
        if self.parametrization == "full":
            return None
        return {key: getattr(self, key) for key in (*ADAPTER_KEYS, *SHARED_KEYS)}

    @property
    def magnitude_optimizer(self) -> Adam:
        """What steps the magnitudes."""
        return Adam(self, prefix="magnitude_")


@dataclass
class TangentProjection(Projection):
    """A projection of dL/dv.

    Attributes:
        frame: on the units that this rank holds.
        weight_squares: this rank's contribution to ``|W|^2``: matrices x held units x 1, fp32.
        norms: ``|W|`` before the step: matrices x owned units x 1, fp32.
        dg: dL/dg: matrices x owned units x 1, fp32.
    """

    frame: Frame = field(kw_only=True)
    weight_squares: torch.Tensor = field(kw_only=True)
    norms: torch.Tensor = field(kw_only=True)
    dg: torch.Tensor = field(kw_only=True)

    def scale_by(self, factor: float) -> None:
        """Multiply the gradients of both magnitude and direction, as it were."""
        super().scale_by(factor)
        self.dg = self.dg * factor

    def gradient_squares(self, shard: MatrixShard, options: GradNormLoRPOptions) -> torch.Tensor:
        """Squared norms of the kept rows of dL/dv, which is formed a piece at a time."""
        tangent = Tangent(shard, magnitude_axis(shard, options), self.frame)
        pieces = (p._replace(values=tangent.dense_gradient(p)) for p in shard.gradient.dense_pieces)
        return sum_of_squares(shard, shard.kept, pieces, self.safe_scale)


class GradNormLoRPMethod(Method):
    """GradNormLoRP on the matrices of a stack: whole weights, or factors of adapters."""

    name: ClassVar[str] = "GradNormLoRP"
    Options: ClassVar[type[GradNormLoRPOptions]] = GradNormLoRPOptions

    @staticmethod
    def role_override(name: str, options: GradNormLoRPOptions) -> tuple[bool, str] | None:
        """With adapters, their factors A and B are projected and nothing else."""
        if options.parametrization == "full":
            return None
        return (True, "adapter") if is_factor(name) else (False, "no adapter")

    @staticmethod
    def missing_requirement(names: Collection[str], options: GradNormLoRPOptions) -> str | None:
        """Adapters in the model and ``parametrization`` must agree."""
        has_adapters = any(map(is_factor, names))
        if options.parametrization == "adapter" and not has_adapters:
            return "parametrization 'adapter' needs a model with adapters: call ds_lowrank.add_adapters(model) first"
        if options.parametrization == "full" and has_adapters:
            return "the model has adapters, and parametrization is 'full': set it to 'adapter', or leave them out"
        return None

    @staticmethod
    def phase(name: str, step: int, options: GradNormLoRPOptions) -> bool:
        """Whether a staggered refresh is due."""
        return GaLoreMethod.phase(name, step, options)

    @staticmethod
    def state(shard: MatrixShard, options: GradNormLoRPOptions, rank: int) -> StateSpec:
        """GaLore's state, and for whole weights g and ``|v|`` with the moments of g, one number per unit each."""
        spec = galore_state(shard, options, rank)
        if options.parametrization == "adapter":
            return spec
        axis = magnitude_axis(shard, options)
        lengths = {"magnitude": TensorSpec(axis, 1), "direction_norm": TensorSpec(axis, 1)}
        return {**spec, **lengths, **options.magnitude_optimizer.state(shard, axis, 1)}

    @staticmethod
    def needs_gradient(options: GradNormLoRPOptions) -> None:
        """An ordinary step needs ``G Q`` and ``<G, W>`` only."""

    @staticmethod
    def factors(shard: MatrixShard, state: State, options: GradNormLoRPOptions) -> Program[Sums | None]:
        """What ``G`` is multiplied by: ``Q``, or ``diag(g / |v|) Q`` if the units are along what is summed over."""
        found = yield from GaLoreMethod.factors(shard, state, options)
        if found is None or options.parametrization == "adapter" or magnitude_axis(shard, options) is shard.kept:
            return found
        axis = magnitude_axis(shard, options)
        weight_squares = squared_norms(shard, axis, shard.weights, are_ordinary=True)
        norms = (yield axis.reduce_scatter(shard.once(weight_squares))).sqrt()  # |W|
        g_over_v = yield axis.all_gather(stretch(state, norms))
        return (g_over_v * found[0],)

    @staticmethod
    def measure(shard: MatrixShard, options: GradNormLoRPOptions, factors: Sums) -> Sums:
        """``G Q`` and, for each unit, ``<G, W>`` of a micro-batch."""
        product = shard.times(factors[0])
        if options.parametrization == "adapter":
            return (product,)
        return product, dots(shard, magnitude_axis(shard, options), shard.gradient, shard.weights)

    @staticmethod
    def project(shard: MatrixShard, state: State, options: GradNormLoRPOptions) -> Program[Projection]:
        """Project dL/dv as GaLore projects a gradient."""
        if options.parametrization == "adapter":
            return (yield from GaLoreMethod.project(shard, state, options))
        axis = magnitude_axis(shard, options)
        weight_squares = squared_norms(shard, axis, shard.weights, are_ordinary=True)
        of_ranks = dots(shard, axis, shard.gradient, shard.weights) if shard.sums is None else shard.sums[1]
        squares, inner = yield (
            axis.reduce_scatter(shard.once(weight_squares)),  # |W|^2
            axis.reduce_scatter(of_ranks),  # <G, W>
        )
        norms = squares.sqrt()
        g, v = magnitudes(state, norms)
        sign = torch.where(g < 0, -1.0, torch.ones_like(g))
        frame = yield from gather_frame(
            axis,
            stretch(state, norms),
            safe_ratio(inner, squares),
            safe_ratio(sign * v, norms, otherwise=1.0),
        )
        found = yield from GaLoreMethod.project(Tangent(shard, axis, frame), state, options)
        dg = safe_ratio(sign * inner, norms)  # dL/dg = sign(g) <G, W> / |W|
        return TangentProjection(
            found.projected,
            found.due,
            own=found.own,
            basis=found.basis,
            is_drawn=found.is_drawn,
            frame=frame,
            weight_squares=weight_squares,
            norms=norms,
            dg=dg,
        )

    @staticmethod
    def update(shard: MatrixShard, state: State, options: GradNormLoRPOptions, found: Projection) -> Program[Update]:
        """Step g and v, and replace W by ``g v / |v|``."""
        lift = yield from GaLoreMethod.update(shard, state, options, found)  # scale * N Q^T
        if not isinstance(found, TangentProjection):
            return lift
        axis = magnitude_axis(shard, options)
        g, v = magnitudes(state, found.norms)
        inner = options.magnitude_optimizer
        direction = yield from inner.direction(shard, axis, state, found.dg, state["step"] + 1)  # Adam(dL/dg)
        if options.effective_lr == 0:
            state["magnitude"], state["direction_norm"] = g, v
            return NewWeights(lambda piece: piece.values)
        kept, rate = 1 - options.decay, options.rate
        g = kept * g - rate * direction
        moved = MovedDirections(shard, axis, lift, found.frame, found.weight_squares, kept, rate)
        v = (yield axis.reduce_scatter(shard.once(moved.squared_lengths()))).clamp_min(0).sqrt()
        g = torch.where(found.norms == 0, v, g)  # a unit of zeros
        state["magnitude"], state["direction_norm"] = g, v
        return moved.of_lengths((yield axis.all_gather(safe_ratio(g, v))))  # W = g v / |v|


def is_factor(name: str) -> bool:
    """Whether a parameter of that name is an adapter's A or B."""
    return name.rpartition(".")[2] in ADAPTER_FACTORS


def magnitude_axis(shard: MatrixShard, options: GradNormLoRPOptions) -> Axis:
    """The dimension whose rows have a magnitude each. Output units are rows, unless the layer stores it transposed."""
    return shard.rows if (options.norm_axis == "output") != shard.transposed else shard.columns


def stretch(state: State, norms: torch.Tensor) -> torch.Tensor:
    """``g / |v|``, and 1 for a unit of zeros: matrices x owned units x 1."""
    g, v = magnitudes(state, norms)
    return torch.where(norms == 0, 1.0, g / v)


def magnitudes(state: State, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``g`` and ``|v|``, matrices x owned units x 1: as stored, and before the first step the norms of W."""
    return (norms, norms) if state["step"] == 0 else (state["magnitude"], state["direction_norm"])
