"""APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270, Algorithm 1): Adam's step size for every channel, no basis.

With the compressed dimension second, ``H`` is kept x compressed. Adam runs on a random projection and only says how
long each row of the raw gradient should be:

    every T steps    P <- a new N(0, 1/r), compressed x r: a function of (seed, name, counter), never stored
    R  <- H P
    R~ <- Adam(R)
    s_i <- |R~_i| / |R_i|                 one a channel; Mini: r = 1 and one s = |R~| / |R| for the whole matrix
    S  <- diag(s) H
    S  <- S * gamma |S_before| / |S|      if |S| > gamma |S_before|: the norm-growth limiter
    W  <- W - lr * alpha * S
"""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from ds_lowrank.linalg.moments import adam
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.range_finder import held_sketch
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Update


class ApolloOptions(Options):
    """The paper's own knobs."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*Options.fixed_on_resume, "mini", "rank")

    mini: bool = Field(False, strict=True)
    """APOLLO-Mini: rank 1, one factor a matrix, and a scale of sqrt(128) unless another is given."""
    rank: int = Field(128, gt=0, strict=True)
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """The paper's alpha itself; the official code's ``scale`` is its square."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """T, in optimizer steps."""
    norm_growth_limit: float | None = Field(1.01, ge=1, allow_inf_nan=False)
    """gamma; None switches the limiter off."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_mini(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("mini") is True:
            return {"rank": 1, "scale": sqrt(128), **given}
        return given

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.mini and self.rank != 1:
            raise ValueError(f"mini has rank 1, got rank {self.rank}: set rank to 1, or mini to false")


class Apollo(Method):
    """APOLLO on one matrix."""

    name: ClassVar[str] = "Apollo"
    Options: ClassVar[type[ApolloOptions]] = ApolloOptions

    @staticmethod
    def state(shard: MatrixShard, options: ApolloOptions, rank: int) -> StateSpec:
        return {
            "exp_avg": options.first_moment_spec(shard.kept, rank),
            "exp_avg_sq": options.second_moment_spec(shard.kept, rank),
            "scaled_norm": TensorSpec(shard.replicated_axis(1), 1),
        }

    @staticmethod
    def project(shard: MatrixShard, state: State, options: ApolloOptions, step: int) -> Program[ProjectedGradient]:
        rank = Apollo.rank(shard.shape, options)
        projection = held_sketch(shard, rank, options.seed, step // options.update_proj_gap) / sqrt(rank)
        projected = yield shard.kept.reduce_scatter(shard.times(projection))
        return ProjectedGradient(projected, step % options.update_proj_gap == 0)

    @staticmethod
    def update(
        shard: MatrixShard, state: State, options: ApolloOptions, step: int, found: ProjectedGradient
    ) -> Program[Update]:
        adapted = adam(state["exp_avg"], state["exp_avg_sq"], found.projected, options.betas, options.eps, step + 1)
        factors = yield from scaling_factors(shard, options, adapted, found.projected / found.safe_scale)
        factors = yield from limited(shard, state, options, factors, found.safe_scale)

        def scaled() -> torch.Tensor:
            flat = torch.empty(shard.part.numel, device=factors.device)
            for rectangle, piece, gradient in zip(
                shard.part.rectangles, shard.views(flat), shard.gradient, strict=True
            ):
                torch.mul(gradient, shard.kept_of(rectangle, factors), out=piece)
            return flat

        return Dense(scaled, options.scale / found.safe_scale)


def scaling_factors(
    shard: MatrixShard, options: ApolloOptions, adapted: torch.Tensor, projected: torch.Tensor
) -> Program[torch.Tensor]:
    """``s`` for the kept rows that this rank holds: held rows x 1, zero where the projected gradient is.

    Args:
        adapted, projected: ``R~`` and ``R``, owned kept rows x rank.
    """
    if options.mini:
        norms = yield shard.all_reduce(torch.stack([adapted.square().sum(), projected.square().sum()]).view(2, 1))
        lengths = norms.sqrt().expand(2, shard.kept.held[1] - shard.kept.held[0])
        return ratio(lengths[0], lengths[1]).unsqueeze(1)
    own = ratio(torch.linalg.vector_norm(adapted, dim=1), torch.linalg.vector_norm(projected, dim=1))
    factors: torch.Tensor = yield shard.kept.all_gather(own.unsqueeze(1))
    return factors


def ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Elementwise, zero where the denominator is."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def limited(
    shard: MatrixShard, state: State, options: ApolloOptions, factors: torch.Tensor, unit: float
) -> Program[torch.Tensor]:
    """The factors after the norm-growth limiter, which notes the norm of ``S`` that they leave.

    Args:
        factors: held kept rows x 1, for ``H / unit``.
    """
    if options.norm_growth_limit is None:
        return factors
    squares = (factors.square() * shard.kept_squares(unit)).sum().view(1, 1)
    squares, before = yield shard.all_reduce(squares), shard.replicated_axis(1).all_gather(state["scaled_norm"])
    norm, allowed = squares.sqrt(), options.norm_growth_limit * shard.or_zeros(before, 1)
    factor = torch.where((allowed > 0) & (norm > allowed), allowed / norm, 1.0)
    state["scaled_norm"].copy_((norm * factor).expand_as(state["scaled_norm"]))
    return factors * factor
