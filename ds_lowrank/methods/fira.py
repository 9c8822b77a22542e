"""Fira (Chen et al., arXiv 2410.01623, Algorithm 1): GaLore, and what its subspace leaves out, scaled as Adam would.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x r:

    every T steps    Q <- leading subspace of H
    R <- H Q
    N <- Adam(R)                          (or another inner optimizer)
    phi_i <- |N_i| / |R_i|                one per kept row; ``scaling`` matrix: one phi = |N| / |R|
    S <- diag(phi) (H - R Q^T)            ``residual`` official: H - alpha R Q^T
    S <- S * gamma |S_before| / |S|       if |S| > gamma |S_before|: the norm-growth limiter
    W <- W - lr * (alpha * N Q^T + S)

``S`` is not formed to be measured: with an orthonormal ``Q``, ``|H_i - R_i Q^T|^2 = |H_i|^2 - |R_i|^2``. A basis that
is stored in fewer bits is not quite orthonormal, and ``Q^T Q`` is summed over ranks.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.norm_growth import limit_growth, norm_spec
from ds_lowrank.methods.blocks.projection import safe_ratio
from ds_lowrank.methods.blocks.rest import ROUNDING, row_squares, with_rest
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import Projection, basis_of_step
from ds_lowrank.methods.galore import GaLoreMethod, GaLoreOptions, change_basis, galore_state
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Update

LARGEST = torch.finfo(torch.float32).max


class FiraOptions(GaLoreOptions):
    """The keys of Fira, in addition to GaLore's."""

    rate_key: ClassVar[str | None] = None  # scale is that of the part in the subspace

    norm_growth_limit: float | None = Field(1.01, ge=1, allow_inf_nan=False)
    """gamma; None switches the limiter off."""
    residual: Literal["paper", "official"] = "paper"
    """What is left of the gradient: ``H - R Q^T``, or ``H - alpha R Q^T`` as in the official code."""
    scaling: Literal["channel", "matrix"] = "channel"
    """Whether every kept row has a phi of its own, or the matrix has one."""
    ratio_moments: Literal["corrected", "uncorrected"] = "corrected"
    """Whether phi is of Adam's bias-corrected direction, or, as in the official code, of the one before correction,
    which then multiplies ``S``. The limiter compares other norms then."""

    def model_post_init(self, context: Any) -> None:
        """Refuse a direction that is not in the subspace, and moments that are not Adam's."""
        super().model_post_init(context)
        if self.ratio_moments == "uncorrected" and self.inner != "adamw":
            raise ValueError(f"ratio_moments belongs to inner 'adamw', inner is {self.inner!r}: remove one of them")
        if self.lion_sign == "original":
            raise ValueError("phi needs a direction in the subspace: set lion_sign to 'subspace'")


class FiraMethod(Method):
    """Fira on the matrices of a stack."""

    name: ClassVar[str] = "Fira"
    Options: ClassVar[type[FiraOptions]] = FiraOptions

    @staticmethod
    def phase(name: str, step: int, options: FiraOptions) -> bool:
        """Whether a staggered refresh is due."""
        return GaLoreMethod.phase(name, step, options)

    @staticmethod
    def state(shard: MatrixShard, options: FiraOptions, rank: int) -> StateSpec:
        """GaLore's state, and the norm of the last ``S``, one number."""
        return {**galore_state(shard, options, rank), "rest_norm": norm_spec(shard)}

    @staticmethod
    def needs_gradient(options: FiraOptions) -> str:
        """A step adds what the subspace leaves out of the gradient."""
        return "it adds what the subspace leaves out of the whole gradient: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: FiraOptions) -> Program[Projection]:
        """Find the basis if it is due, and project: ``R = H Q``."""
        return (yield from GaLoreMethod.project(shard, state, options))

    @staticmethod
    def update(shard: MatrixShard, state: State, options: FiraOptions, found: Projection) -> Program[Update]:
        """The update ``alpha N Q^T + S``."""
        basis = yield from basis_of_step(shard, state, options, found)
        if found.refreshed:
            yield from change_basis(shard, state, options, found.own)
        inner, alpha, step = options.inner_optimizer, options.scale, state["step"] + 1
        direction = yield from inner.direction(shard, shard.kept, state, found.projected, step)  # N
        correction, share = bias_correction(options, step), 1.0 if options.residual == "paper" else alpha
        squares, rest = yield from row_squares(shard, options, found, share)  # |H_i|^2
        projected = found.projected / found.safe_scale
        phi = yield from scaling_factors(shard, options, direction / correction, projected, squares)
        total = (phi * rest.sqrt()).square().sum((1, 2), keepdim=True)  # |S|^2
        factor = yield from limit_growth(shard, state, "rest_norm", options.norm_growth_limit, total)
        shares = (correction * phi * factor / found.safe_scale).clamp_max(LARGEST)
        return (yield from with_rest(shard, alpha * direction, share * found.projected, basis, shares, 1.0))


def bias_correction(options: FiraOptions, step: int) -> float:
    """What Adam's direction before correction is multiplied by; 1 where phi is of the corrected one."""
    if options.ratio_moments == "corrected":
        return 1.0
    return sqrt(1 - options.betas[1] ** step) / (1 - options.betas[0] ** step)


def scaling_factors(
    shard: MatrixShard, options: FiraOptions, direction: torch.Tensor, projected: torch.Tensor, squares: torch.Tensor
) -> Program[torch.Tensor]:
    """``phi_i = |N_i| / |R_i|``, or one ``phi = |N| / |R|``; zero where ``R`` is zero, or a rounding error of ``H``.

    Args:
        shard: the stack.
        options: with ``scaling``.
        direction: ``N``: matrices x owned kept rows x r, fp32.
        projected: ``R``, likewise.
        squares: ``|H_i|^2``, over the square of the same factor as ``R``: matrices x owned kept rows x 1, fp32.

    Returns:
        matrices x owned kept rows x 1, fp32.
    """
    of_direction, of_projected = (x.square().sum(2, keepdim=True) for x in (direction, projected))
    if options.scaling == "matrix":
        sums = torch.cat([x.sum(1, keepdim=True) for x in (of_direction, of_projected, squares)], dim=1)
        of_direction, of_projected, squares = (yield shard.all_reduce(sums)).split(1, dim=1)
    is_rounding = of_projected <= ROUNDING**2 * squares
    phi = torch.where(is_rounding, 0.0, safe_ratio(of_direction.sqrt(), of_projected.sqrt()))
    return phi.expand(-1, shard.kept.owned_rows, -1)
