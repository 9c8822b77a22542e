"""VLoRP with ProjFactor (arXiv 2505.01744): random projections whose unit is a piece of a row, or several rows.

With the compressed dimension second, ``H`` is kept x compressed. A granularity c and a rank r share a budget of c * r
numbers for every row:

    H~ <- reshape(H, kept * c, compressed / c)
    R  <- H~ P                            P from N(0, 1/r) or +-1/sqrt(r): a function of (seed, name, resample counter)
    M  <- beta1 M + (1 - beta1) R         and M P^T, in the shape of H, is the direction

ProjFactor divides it by the root of a second moment that is kept in the original space, in two factors:

    H^ <- s * reshape(R P^T, kept, compressed)                           s: scale, a factor on whatever is lifted
    v_row, v_col <- averages of the sums of H^ * H^ over columns and over rows
    W <- W - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * s * reshape(M P^T) / (sqrt(v_row v_col / sum v_row) + eps)

Without moments, as the paper's Theorem 1 has it: ``W <- W - lr * H^``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.moments import adam, rotate_first
from ds_lowrank.linalg.sketch import normal, signs
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.full_rank_adam import full_rank_adam, full_rank_state
from ds_lowrank.methods.blocks.granularity import Granularity, divisors
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.unit_squares import squares_by_rows, sums_of_squares
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.elementwise import along
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program, without_rounds
from ds_lowrank.sharding.units import Units, viewed
from ds_lowrank.sharding.updates import Dense, Quotient, Update


class VLoRPOptions(Options):
    """The keys of VLoRP."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (
        *Options.fixed_on_resume,
        "rank",
        "granularity",
        "update_scheme",
        "scale",
        "distribution",
        "update_proj_gap",
        "left_view",
        "seed",
    )

    rate_key: ClassVar[str | None] = None  # scale divides eps

    eps: float = Field(1e-6, gt=0, allow_inf_nan=False)
    """Added to the root of the second moment."""
    rank: int = Field(4, gt=0, strict=True)
    """Columns of ``P``, r."""
    granularity: Granularity = 64
    """c, units per row; below 1, one unit is 1/c rows."""
    update_scheme: Literal["projfactor", "subspace", "original_space", "sgd"] = "projfactor"
    """ProjFactor; Adam on ``R``; Adam of full size on ``R P^T``; or ``R P^T`` itself, without any state."""
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """The official code's: multiplies what is lifted, in M and in the second moment. ProjFactor and Adam of full size
    divide it out again, up to an epsilon that is in effect ``eps / scale``; the other schemes are scaled by it."""
    distribution: Literal["gaussian", "rademacher"] = "gaussian"
    """The distribution of ``P``."""
    update_proj_gap: int = Field(100, gt=0, strict=True)
    """How many optimizer steps a projection lasts."""
    moment_on_resample: Literal["keep", "reset", "reproject"] = "keep"
    """What a new projection does to the moments of ``R``."""
    left_view: Literal["transpose", "official"] = "transpose"
    """How a wide matrix is cut into units: as its transpose would be, or strided as in the official code."""
    eps_position: Literal["outside", "inside"] = "outside"
    """ProjFactor: ``sqrt(v) + eps`` or ``sqrt(v + eps)``."""
    bias_correction: Literal["sqrt", "linear"] = "sqrt"
    """ProjFactor: ``sqrt(1 - beta2^t)`` or ``1 - beta2^t`` over ``1 - beta1^t``."""

    def model_post_init(self, context: Any) -> None:
        """Refuse options of a scheme that was not chosen."""
        super().model_post_init(context)
        if self.update_scheme in ("original_space", "sgd") and self.moment_on_resample != "keep":
            raise ValueError(
                f"update_scheme {self.update_scheme!r} has no moments in the projected space: set moment_on_resample "
                "to 'keep'"
            )
        for key, neutral in (("eps_position", "outside"), ("bias_correction", "sqrt")):
            if self.update_scheme != "projfactor" and getattr(self, key) != neutral:
                raise ValueError(f"{key} belongs to update_scheme 'projfactor': remove it, or set that")

    @property
    def c(self) -> Fraction:
        """The granularity as a number."""
        return Fraction(self.granularity)


@dataclass
class ProjectedUnits(ProjectedGradient):
    """The gradients' units under random projections.

    ``projected`` is matrices x owned groups x (units per group * rank).

    Attributes:
        projection: ``P``, matrices x entries of a unit x rank, fp32.
    """

    projection: torch.Tensor = field(kw_only=True)


class VLoRPMethod(Method):
    """VLoRP on the matrices of a stack."""

    name: ClassVar[str] = "VLoRP"
    Options: ClassVar[type[VLoRPOptions]] = VLoRPOptions

    @staticmethod
    def rank(shape: tuple[int, int], options: VLoRPOptions) -> int:
        """The rank of ``P``, at most the length of a unit."""
        _, compressed = oriented(shape, options)
        return min(options.rank, int(compressed / options.c))

    @classmethod
    def rank_text(cls, shape: tuple[int, int], options: VLoRPOptions) -> str:
        """The rank as the role table shows it."""
        return f"{super().rank_text(shape, options)} x {options.granularity} units a row"

    @staticmethod
    def unsupported_shape(shape: tuple[int, int], options: VLoRPOptions) -> str | None:
        """A granularity must divide the matrix into whole units."""
        kept, compressed = oriented(shape, options)
        if (kept * options.c).denominator == (compressed / options.c).denominator == 1:
            return None
        p, q = (", ".join(map(str, divisors(size))) for size in (compressed, kept))
        return f"granularity {options.granularity} does not fit; p/q does for p in {{{p}}} and q in {{{q}}}"

    @staticmethod
    def state(shard: MatrixShard, options: VLoRPOptions, rank: int) -> StateSpec:
        """ProjFactor: M of R's shape and two factors; ``subspace``: two moments; ``sgd``: none; else two of W's."""
        if options.update_scheme == "sgd":
            return {}
        if options.update_scheme == "original_space":
            return full_rank_state(shard, options)
        units = units_of(shard, options)
        columns = units.per_group * rank
        moment = options.first_moment_spec(units.axis, columns)
        if options.update_scheme == "subspace":
            return {"exp_avg": moment, "exp_avg_sq": options.second_moment_spec(units.axis, columns)}
        v_row, v_col = TensorSpec(shard.rows, 1), TensorSpec(shard.columns, 1)
        return {"exp_avg": moment, "row_squares": v_row, "column_squares": v_col}

    @staticmethod
    def needs_gradient(options: VLoRPOptions) -> str | None:
        """A step needs ``R = H~ P`` only; ``P`` is random, so that no step needs the gradient."""
        if options.update_scheme == "original_space":
            return "update_scheme 'original_space' keeps moments of every element on every rank: choose another scheme"
        return None

    @staticmethod
    @without_rounds
    def factors(shard: MatrixShard, state: State, options: VLoRPOptions) -> Sums:
        """``P`` of the next step."""
        return (draw(units_of(shard, options), options, state["step"] // options.update_proj_gap),)

    @staticmethod
    def measure(shard: MatrixShard, options: VLoRPOptions, factors: Sums) -> Sums:
        """``R = H~ P`` of a micro-batch."""
        return (units_of(shard, options).times(factors[0]),)

    @staticmethod
    def project(shard: MatrixShard, state: State, options: VLoRPOptions) -> Program[ProjectedUnits]:
        """``R = H~ P`` for this interval's random projection."""
        units, step = units_of(shard, options), state["step"]
        projection = draw(units, options, step // options.update_proj_gap)  # P
        of_ranks = units.times(projection) if shard.sums is None else shard.sums[0]
        projected = yield units.axis.reduce_scatter(of_ranks)  # R = H~ P
        return ProjectedUnits(projected, step % options.update_proj_gap == 0, projection=projection)

    @staticmethod
    def update(shard: MatrixShard, state: State, options: VLoRPOptions, found: ProjectedUnits) -> Program[Update]:
        """The update of the chosen scheme, after what a new projection does to the moments."""
        if found.refreshed and state["step"] > 0:  # before the first projection there was none
            resample(shard, state, options, found)
        match options.update_scheme:
            case "projfactor":
                return (yield from projfactor(shard, state, options, found))
            case "subspace":
                return (yield from in_subspace(shard, state, options, found))
            case "sgd":
                units = units_of(shard, options)
                projected = yield units.axis.all_gather(found.projected)
                return Dense(partial(units.lift, projected, found.projection), options.scale)  # s R P^T
        return (yield from in_original_space(shard, state, options, found))


def projfactor(shard: MatrixShard, state: State, options: VLoRPOptions, found: ProjectedUnits) -> Program[Update]:
    """ProjFactor: ``s M P^T`` over the root of a second moment in two factors."""
    units, projection = units_of(shard, options), options.scale * found.projection  # s P, which lifts
    beta1, beta2 = options.betas
    moment = state["exp_avg"].lerp_(found.projected, 1 - beta1)  # M <- beta1 M + (1 - beta1) R
    if units.are_in_rows:
        moment, kept_sums, compressed_sums = yield from squares_by_rows(
            shard, units, found.projected, projection, moment
        )
        by_side = (kept_sums, compressed_sums) if shard.side == "right" else (compressed_sums, kept_sums)
        row_sums, column_sums = by_side
    else:
        projected, moment = yield units.axis.all_gather(found.projected), units.axis.all_gather(moment)
        row_sums, column_sums = yield sums_of_squares(shard, partial(units.lift, projected, projection))  # of R P^T
    row_squares, column_squares = state["row_squares"], state["column_squares"]
    row_squares.lerp_(row_sums, 1 - beta2)  # v_row
    column_squares.lerp_(column_sums, 1 - beta2)  # v_col
    row_squares, column_squares, total = yield (
        shard.rows.all_gather(row_squares),
        shard.columns.all_gather(column_squares),
        shard.all_reduce(row_squares.sum((1, 2), keepdim=True)),
    )
    # Squares of a projected gradient that is not zero may still underflow to zero, all of them.
    row_shares = row_squares / total.clamp_min(torch.finfo(torch.float32).tiny)

    eps = torch.full((), options.eps, dtype=torch.float32, device=shard.device)
    inside = options.eps_position == "inside"
    if not inside:
        row_shares, column_squares = row_shares.sqrt(), column_squares.sqrt()

    def root(by_row: torch.Tensor, by_column: torch.Tensor) -> torch.Tensor:
        """``sqrt(v) + eps`` or ``sqrt(v + eps)`` with ``v = v_row v_col / sum v_row``."""
        found = torch.addcmul(eps, by_row, by_column)
        return found.sqrt_() if inside else found

    def root_at(piece: Piece) -> torch.Tensor:
        return root(along(shard, shard.rows, piece, row_shares), along(shard, shard.columns, piece, column_squares))

    singles = units.lifted_singles(moment, projection)
    roots = map(root, row_shares, column_squares.mT)
    second = 1 - beta2 ** (state["step"] + 1)
    correction = (second if options.bias_correction == "linear" else second**0.5) / (1 - beta1 ** age(options, state))
    lifted = partial(units.lift, moment, projection)
    by_matrix = None if singles is None else zip(singles, roots, strict=True)
    return Quotient(lifted, root_at, correction, by_matrix)  # s M P^T / (sqrt(v) + eps)


def in_subspace(shard: MatrixShard, state: State, options: VLoRPOptions, found: ProjectedUnits) -> Program[Update]:
    """Adam on ``R``, lifted: ``s N P^T``."""
    units, moments = units_of(shard, options), (state["exp_avg"], state["exp_avg_sq"])
    step = age(options, state)
    direction = adam(*moments, found.projected, options.betas, options.eps_at(step), step)  # N = Adam(R)
    direction = yield units.axis.all_gather(direction)
    return Dense(partial(units.lift, direction, found.projection), options.scale)  # s N P^T


def in_original_space(
    shard: MatrixShard, state: State, options: VLoRPOptions, found: ProjectedUnits
) -> Program[Update]:
    """Adam of full size on ``s R P^T``, the gradient projected and lifted again."""
    units = units_of(shard, options)
    projected = yield units.axis.all_gather(found.projected)
    lifted = partial(units.lift, projected, options.scale * found.projection)
    return (yield from full_rank_adam(shard, state, options, lifted))


def resample(shard: MatrixShard, state: State, options: VLoRPOptions, found: ProjectedUnits) -> None:
    """What a new projection does to the moments of ``R``.

    ``reproject`` is Flora's rule (arXiv 2402.03293), ``M <- M P_old^T P_new``, over ``sqrt(1 + (L + 1) / r)``, by which
    it would lengthen the lifted M on average. A second moment has the same expectation in any random coordinates, and
    stays.
    """
    if options.moment_on_resample == "reset":
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                state[key].zero_()
    if options.moment_on_resample == "reproject":
        old = draw(units_of(shard, options), options, state["step"] // options.update_proj_gap - 1)  # P_old
        _, length, rank = old.shape
        rotation = old.mT @ found.projection / math.sqrt(1 + (length + 1) / rank)
        rotate_first(state["exp_avg"].view(len(old), -1, rank), rotation)


def age(options: VLoRPOptions, state: State) -> int:
    """The number of steps that the moments of ``R`` have averaged, this one included."""
    step: int = state["step"]
    return (step % options.update_proj_gap if options.moment_on_resample == "reset" else step) + 1


def oriented(shape: tuple[int, int], options: VLoRPOptions) -> tuple[int, int]:
    """The sizes of the kept and of the compressed dimension."""
    return shape if VLoRPMethod.side(shape, options) == "right" else (shape[1], shape[0])


def units_of(shard: MatrixShard, options: VLoRPOptions) -> Units:
    """The gradients in units of this granularity: ``H~``."""
    if (shard.side == "left") != shard.transposed and options.left_view == "official":
        kept, compressed = shard.kept.size, shard.compressed.size
        return Units(viewed(shard, (int(compressed / options.c), int(kept * options.c))), Fraction(1), is_view=True)
    return Units(shard, options.c)


def draw(units: Units, options: VLoRPOptions, counter: int) -> torch.Tensor:
    """``P``, matrices x entries of a unit x rank, fp32; nothing on a rank without elements, which needs none."""
    rank = min(options.rank, units.length)
    shard = units.shard
    entries = (0, units.length if shard.part.numel else 0)
    sample = normal if options.distribution == "gaussian" else signs
    return sample(options.seed, shard.names, counter, entries, (0, rank), shard.device) / math.sqrt(rank)
