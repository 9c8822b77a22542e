"""APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270, Algorithm 1): Adam's step size for every channel, no basis.

With the compressed dimension second, ``H`` is kept x compressed. Adam runs on a random projection and only says how
long each row of the raw gradient should be:

    every T steps    P <- a new N(0, 1/r), compressed x r: a function of (seed, name, counter), never stored
    R  <- H P
    R~ <- Adam(R)
    s_i <- |R~_i| / |R_i|                 one per channel; Mini: r = 1 and one s = |R~| / |R| for the whole matrix
    S  <- diag(s) H
    S  <- S * gamma |S_before| / |S|      if |S| > gamma |S_before|: the norm-growth limiter
    W  <- W - lr * alpha * S
"""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from ds_lowrank.linalg.moments import adam
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.norm_growth import limit_growth, norm_spec
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient, safe_ratio
from ds_lowrank.methods.blocks.range_finder import held_sketch
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.sharding.elementwise import squared_norms
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import ScaledGradient, Update


class ApolloOptions(Options):
    """The keys of APOLLO."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*Options.fixed_on_resume, "mini", "rank")

    mini: bool = Field(False, strict=True)
    """APOLLO-Mini: rank 1, one factor per matrix, and a scale of sqrt(128) unless another is given."""
    rank: int = Field(128, gt=0, strict=True)
    """Columns of ``P``, r."""
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """The paper's alpha; the official code's ``scale`` is its square."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """T, in optimizer steps."""
    norm_growth_limit: float | None = Field(1.01, ge=1, allow_inf_nan=False)
    """gamma; None switches the limiter off."""
    ratio_moments: Literal["corrected", "uncorrected"] = "corrected"
    """Whether ``R~`` is of bias-corrected moments, or, as in the official code, of moments as they are, while the
    correction multiplies the step. The limiter compares other norms then."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_mini(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("mini") is True:
            return {"rank": 1, "scale": sqrt(128), **given}
        return given

    def model_post_init(self, context: Any) -> None:
        """Refuse another rank than Mini's."""
        super().model_post_init(context)
        if self.mini and self.rank != 1:
            raise ValueError(f"mini has rank 1, got rank {self.rank}: set rank to 1, or mini to false")


class ApolloMethod(Method):
    """APOLLO on the matrices of a stack."""

    name: ClassVar[str] = "Apollo"
    Options: ClassVar[type[ApolloOptions]] = ApolloOptions

    @staticmethod
    def state(shard: MatrixShard, options: ApolloOptions, rank: int) -> StateSpec:
        """Adam's moments of ``R``, kept x r, and the norm of the last ``S``, one number."""
        return {
            "exp_avg": options.first_moment_spec(shard.kept, rank),
            "exp_avg_sq": options.second_moment_spec(shard.kept, rank),
            "scaled_norm": norm_spec(shard),
        }

    @staticmethod
    def needs_gradient(options: ApolloOptions) -> str:
        """A step scales the gradient itself."""
        return "it scales the gradient itself, which every rank needs whole: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: ApolloOptions) -> Program[ProjectedGradient]:
        """``R = H P`` for this interval's random projection."""
        rank, step = ApolloMethod.rank(shard.shape, options), state["step"]
        projection = held_sketch(shard, rank, options.seed, step // options.update_proj_gap) / sqrt(rank)  # P
        projected = yield shard.kept.reduce_scatter(shard.times(projection))  # R = H P
        return ProjectedGradient(projected, due=step % options.update_proj_gap == 0)

    @staticmethod
    def update(shard: MatrixShard, state: State, options: ApolloOptions, found: ProjectedGradient) -> Program[Update]:
        """The update ``alpha * S`` with ``S = diag(s) H``."""
        moments, safe_scale = (state["exp_avg"], state["exp_avg_sq"]), found.safe_scale
        step, correction = state["step"] + 1, 1.0
        adapted = adam(*moments, found.projected, options.betas, options.eps_at(step), step)  # R~ = Adam(R)
        if options.ratio_moments == "uncorrected":
            correction = sqrt(1 - options.betas[1] ** step) / (1 - options.betas[0] ** step)
            adapted /= correction
        factors = yield from scaling_factors(shard, options, adapted, found.projected / safe_scale)  # s
        factors = yield from limited(shard, state, options, factors, found)
        return ScaledGradient(factors, [options.scale * correction / each for each in found.host_safe_scales])


def scaling_factors(
    shard: MatrixShard, options: ApolloOptions, adapted: torch.Tensor, projected: torch.Tensor
) -> Program[torch.Tensor]:
    """``s_i = |R~_i| / |R_i|``; Mini: one ``s = |R~| / |R|``. Zero where the projected gradient is zero.

    Args:
        shard: the stack.
        options: with ``mini``.
        adapted: ``R~``, matrices x owned kept rows x rank, fp32.
        projected: ``R``, matrices x owned kept rows x rank, fp32.

    Returns:
        matrices x held kept rows x 1, fp32.
    """
    if options.mini:
        squares = torch.cat([x.square().sum((1, 2), keepdim=True) for x in (adapted, projected)], dim=1)
        lengths = (yield shard.all_reduce(squares)).sqrt()
        return safe_ratio(lengths[:, :1], lengths[:, 1:]).expand(-1, shard.kept.held_rows, -1)
    own = safe_ratio(*(torch.linalg.vector_norm(x, dim=2, keepdim=True) for x in (adapted, projected)))
    factors: torch.Tensor = yield shard.kept.all_gather(own)
    return factors


def limited(
    shard: MatrixShard, state: State, options: ApolloOptions, factors: torch.Tensor, found: ProjectedGradient
) -> Program[torch.Tensor]:
    """The norm-growth limiter: ``S <- S * gamma |S_before| / |S|`` if ``|S| > gamma |S_before|``.

    Args:
        shard: the stack, with this step's gradient.
        state: with ``|S_before|``, which becomes the norm of the limited ``S``.
        options: with ``norm_growth_limit``, gamma; None switches the limiter off.
        factors: ``s`` for ``H / safe_scale``: matrices x held kept rows x 1, fp32.
        found: with the safe scale of the gradients.

    Returns:
        The factors of the limited ``S``.
    """
    if options.norm_growth_limit is None:
        return factors
    row_norms = squared_norms(shard, shard.kept, shard.gradient, found.safe_scale, found.are_ordinary)
    squares = (factors.square() * row_norms).sum((1, 2), keepdim=True)
    factor = yield from limit_growth(shard, state, "scaled_norm", options.norm_growth_limit, squares)
    return factors * factor
