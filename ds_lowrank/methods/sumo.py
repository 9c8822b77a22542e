"""SUMO (Refael et al., arXiv 2505.24749, Algorithm 1): an orthogonalized momentum in a subspace of the gradient.

With the compressed dimension second, here by default the larger one, ``H`` is kept x compressed, ``Q`` compressed x r:

    every K steps, or when the last |R| <= tol * |R| of the subspace's first step:
                 Q <- leading subspace of H;  M <- M Q_old^T Q
    R <- H Q
    M <- mu M + R
    O <- U V^T                          with M = U S V^T, exactly
    O <- O * gamma |O_before| / |O|     if |O| > gamma |O_before|: the norm-growth limiter
    W <- W - lr * scale * (sqrt(max(m, n)) O Q^T + complement (H - R Q^T))
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.norm_growth import limit_growth, norm_spec
from ds_lowrank.methods.blocks.orthogonalize import orthogonalized
from ds_lowrank.methods.blocks.range_finder import RangeFinderOptions, randomized_range
from ds_lowrank.methods.blocks.rest import with_rest
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import (
    BasisPlacement,
    Projection,
    basis_factors,
    basis_of_step,
    project_on,
    take_basis,
)
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program, concurrently
from ds_lowrank.sharding.updates import Factors, Update


class SumoOptions(RangeFinderOptions):
    """The keys of SUMO."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*RangeFinderOptions.fixed_on_resume, "rank")

    proj_type: Literal["std", "reverse_std", "left", "right"] = "reverse_std"
    """``reverse_std`` compresses the larger dimension (rows if both are equal), ``std`` the other."""
    rank: int = Field(128, gt=0, strict=True)
    """Columns of ``Q``, r."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """mu."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """K, the most optimizer steps that a subspace lasts."""
    grad_norm_tol: float = Field(0.0, ge=0, lt=1)
    """The share of ``|R|`` of its first step at which a subspace is used up; 0 for none."""
    norm_growth_limit: float | None = Field(1.1, ge=1, allow_inf_nan=False)
    """gamma; None switches the limiter off."""
    complement: float = Field(1.0, ge=0, allow_inf_nan=False)
    """The weight of what the subspace leaves out of the gradient."""
    shape_scaling: bool = Field(True, strict=True)
    """Whether ``O`` is multiplied by ``sqrt(max(m, n))``."""
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the update of a projected matrix, not its weight decay."""
    basis_placement: BasisPlacement = "partitioned"
    """Whether a rank stores the rows of a basis that it owns, or keeps all that it computes with between refreshes."""


class SumoMethod(Method):
    """SUMO on the matrices of a stack."""

    name: ClassVar[str] = "Sumo"
    Options: ClassVar[type[SumoOptions]] = SumoOptions

    @staticmethod
    def state(shard: MatrixShard, options: SumoOptions, rank: int) -> StateSpec:
        """``Q`` compressed x r, ``M`` kept x r, and two norms: of the last ``O``, and of the subspace's first ``R``."""
        return {
            "basis": options.basis_spec(shard, rank),
            "momentum_buffer": options.first_moment_spec(shard.kept, rank),
            "orthogonal_norm": norm_spec(shard),
            "first_norm": norm_spec(shard),
            "age": 0,
            "used_up": 1,
        }

    @staticmethod
    def needs_gradient(options: SumoOptions) -> str | None:
        """An ordinary step needs ``R = H Q`` only, unless it adds what the subspace leaves out."""
        if options.complement:
            return (
                "it adds what the subspace leaves out of the gradient: set complement to 0, or reduction to 'gradient'"
            )
        return None

    @staticmethod
    def factors(shard: MatrixShard, state: State, options: SumoOptions) -> Program[Sums | None]:
        """``Q``; None if it is used up."""
        return None if state["used_up"] else (yield from basis_factors(shard, state, options))

    @staticmethod
    def project(shard: MatrixShard, state: State, options: SumoOptions) -> Program[Projection]:
        """``R = H Q``, on a new subspace if the last one is used up."""
        own = state["basis"]
        if state["used_up"]:
            own = yield from randomized_range(shard, own.shape[2], options.seed, state["step"], options.power_steps)
        return (yield from project_on(shard, own, bool(state["used_up"]), options))  # R = H Q

    @staticmethod
    def update(shard: MatrixShard, state: State, options: SumoOptions, found: Projection) -> Program[Update]:
        """The orthogonalized momentum, lifted, and the rest. A change that finds only zeros is tried again."""
        basis, momentum = (yield from basis_of_step(shard, state, options, found)), state["momentum_buffer"]
        if found.refreshed:
            yield from take_basis(shard, state, found.own, momentum)
            state["age"] = 0
        momentum.mul_(options.momentum).add_(found.projected)
        direction = yield from orthogonalized(shard, momentum, "exact")  # O
        squares = direction.square().sum((1, 2), keepdim=True)
        factor, _ = yield from concurrently(
            limit_growth(shard, state, "orthogonal_norm", options.norm_growth_limit, squares),
            note_use(shard, state, options, found),
        )
        direction = direction * factor * (sqrt(max(shard.shape)) if options.shape_scaling else 1.0)
        if options.complement:
            shares = torch.full_like(direction[..., :1], options.complement)
            return (yield from with_rest(shard, direction, found.projected, basis, shares, options.scale))
        return Factors((yield shard.kept.all_gather(direction)), basis, options.scale)


def note_use(shard: MatrixShard, state: State, options: SumoOptions, found: Projection) -> Program[None]:
    """Note whether the subspace is used up: after K steps, or once ``|R|`` is small against that of its first step.

    Args:
        shard: the stack.
        state: with ``age``, ``used_up`` and ``first_norm``, which are brought up to date.
        options: with ``update_proj_gap`` and ``grad_norm_tol``.
        found: with ``R``.
    """
    state["age"] += 1
    is_old = state["age"] >= options.update_proj_gap
    state["used_up"] = int(is_old)
    if options.grad_norm_tol == 0:
        return
    squares = (found.projected / found.safe_scale).square().sum((1, 2), keepdim=True)
    first = state["first_norm"].sum(1, keepdim=True)  # one number, on the rank that owns it
    sums = yield shard.all_reduce(torch.cat([squares, first], dim=1))
    norm, first = sums[:, :1].sqrt() * found.safe_scale, sums[:, 1:]
    if found.refreshed:
        state["first_norm"].copy_(norm.expand_as(state["first_norm"]))
    elif not is_old and not norm.is_meta:  # where a step is costed, only age uses a subspace up
        # All ranks were sent the same bits, and so decide alike.
        state["used_up"] = (norm <= options.grad_norm_tol * first).view(-1).int().tolist()
