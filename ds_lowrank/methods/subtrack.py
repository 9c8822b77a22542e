"""SubTrack++ (Rajabi et al., arXiv 2502.01586): GaLore whose subspace is tracked, and what it leaves out.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x r:

    t = 0            Q <- leading subspace of H
    t = T, 2T, ..    A <- argmin |H - A Q^T|                       that is H Q, as Q is orthonormal
                     F <- -2 (H - A Q^T)^T A ~ sigma u v^T         the gradient of |H - A Q^T|^2, its leading part
                     theta <- min(eta sigma, pi / 2)
                     Q <- Q + (cos(theta) - 1) Q v v^T - sin(theta) u v^T,  C = Q_old^T Q
                     M <- M C,  V <- (1 - beta2^t) |(v - m^2) (C * C) + (m C)^2|, as in LDAdam
    R <- H Q;  N <- Adam(R)
    S <- diag(phi) (H - R Q^T)                                     phi_i = |N_i| / |R_i|, one per kept row
    S <- S * zeta |S_before| / |S|                                 if |S| > zeta |S_before|
    W <- W - lr * (scale * N Q^T + S)

``S`` is not formed to be measured: with an orthonormal ``Q``, ``|H_i - R_i Q^T|^2 = |H_i|^2 - |R_i|^2``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.moments import adam, transport
from ds_lowrank.linalg.orthonormal import RANK_TOLERANCE
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.basis_options import BasisOptions
from ds_lowrank.methods.blocks.geodesic import turned_basis
from ds_lowrank.methods.blocks.norm_growth import limit_growth, norm_spec
from ds_lowrank.methods.blocks.projection import safe_ratio
from ds_lowrank.methods.blocks.range_finder import leading_basis
from ds_lowrank.methods.blocks.rest import row_squares, with_rest
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.subspace import BasisPlacement, Projection, basis_of_step, project_on
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Factors, Update

LARGEST = torch.finfo(torch.float32).max


class SubTrackOptions(BasisOptions):
    """The keys of SubTrack++."""

    rate_key: ClassVar[str | None] = None  # scale is that of the part in the subspace
    fixed_on_resume: ClassVar[tuple[str, ...]] = (*BasisOptions.fixed_on_resume, "rank", "recovery_scaling")

    rank: int = Field(128, gt=0, strict=True)
    """Columns of ``Q``, r; at most the smaller dimension of a matrix."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """T, in optimizer steps."""
    step_size: float = Field(10.0, ge=0, allow_inf_nan=False)
    """eta, of the geodesic step. The angle is eta times a number of the size of the squared gradient."""
    projection_aware: bool = Field(True, strict=True)
    """Whether the moments follow the subspace, or are kept in the old coordinates."""
    recovery_scaling: bool = Field(True, strict=True)
    """Whether what the subspace leaves out of the gradient is added to the update, scaled."""
    norm_growth_limit: float | None = Field(1.01, ge=1, allow_inf_nan=False)
    """zeta; None switches the limiter off."""
    projector: Literal["randomized", "svd"] = "randomized"
    """How the first basis is found: by a randomized range finder, or by an exact SVD on one rank."""
    basis_placement: BasisPlacement = "partitioned"
    """Whether a rank stores the rows of a basis that it owns, or keeps all that it computes with between refreshes."""
    scale: float = Field(0.25, ge=0, allow_inf_nan=False)
    """Multiplies the update in the subspace: neither what is added to it nor weight decay."""

    def model_post_init(self, context: Any) -> None:
        """Refuse a limit without what it limits."""
        super().model_post_init(context)
        if not self.recovery_scaling and self.norm_growth_limit != 1.01:
            raise ValueError("norm_growth_limit belongs to recovery_scaling: remove it, or set that to true")


class SubTrackMethod(Method):
    """SubTrack++ on the matrices of a stack."""

    name: ClassVar[str] = "SubTrack"
    Options: ClassVar[type[SubTrackOptions]] = SubTrackOptions

    @staticmethod
    def state(shard: MatrixShard, options: SubTrackOptions, rank: int) -> StateSpec:
        """``Q`` compressed x r, Adam's moments kept x r, and the norm of the last ``S``, one number."""
        spec: dict[str, TensorSpec | int] = {
            "basis": options.basis_spec(shard, rank),
            "exp_avg": options.first_moment_spec(shard.kept, rank),
            "exp_avg_sq": options.second_moment_spec(shard.kept, rank),
        }
        return spec | {"rest_norm": norm_spec(shard)} if options.recovery_scaling else spec

    @staticmethod
    def needs_gradient(options: SubTrackOptions) -> str:
        """A step adds what the subspace leaves out of the gradient."""
        return "it follows the whole gradient and adds what the subspace leaves out: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: SubTrackOptions) -> Program[Projection]:
        """Move the basis if that is due, and project: ``R = H Q``."""
        due, own = state["step"] % options.update_proj_gap == 0, state["basis"]
        if state["step"] == 0:
            rank = SubTrackMethod.rank(shard.shape, options)
            own = yield from leading_basis(shard, rank, options.projector, options.seed, 0)
        elif due:
            own = yield from turned_basis(shard, own, options.step_size, options.seed, state["step"])
        return (yield from project_on(shard, own, due, options))  # R = H Q

    @staticmethod
    def update(shard: MatrixShard, state: State, options: SubTrackOptions, found: Projection) -> Program[Update]:
        """The update ``scale N Q^T + S``."""
        moments = state["exp_avg"], state["exp_avg_sq"]
        basis = yield from basis_of_step(shard, state, options, found)
        if found.refreshed:
            if options.projection_aware and state["step"] > 0:
                rotation = yield from shard.replicated_sum(state["basis"].mT @ found.own)  # C = Q_old^T Q
                transport(*moments, rotation, options.betas, state["step"])
            state["basis"] = found.own
        direction = adam(
            *moments, found.projected, options.betas, options.eps_at(state["step"] + 1), state["step"] + 1
        )  # N
        if not options.recovery_scaling:
            return Factors((yield shard.kept.all_gather(direction)), basis, options.scale)
        shares = yield from rest_shares(shard, state, options, found, direction)
        return (yield from with_rest(shard, options.scale * direction, found.projected, basis, shares, 1.0))


def rest_shares(
    shard: MatrixShard, state: State, options: SubTrackOptions, found: Projection, direction: torch.Tensor
) -> Program[torch.Tensor]:
    """What multiplies each row of ``H - R Q^T`` to make ``S``: ``phi_i``, limited; 0 where ``R_i`` is 0 or rounding.

    Args:
        shard: the stack, with this step's gradient.
        state: with ``|S_before|``, which becomes ``|S|``.
        options: with ``norm_growth_limit``, zeta.
        found: with ``R``.
        direction: ``N``: matrices x owned kept rows x r, fp32.

    Returns:
        matrices x owned kept rows x 1, fp32.
    """
    squares, rest = yield from row_squares(shard, options, found)  # |H_i|^2
    projected = found.projected / found.safe_scale
    lengths = torch.linalg.vector_norm(projected, dim=2, keepdim=True)
    phi = safe_ratio(torch.linalg.vector_norm(direction, dim=2, keepdim=True), lengths)
    phi = torch.where(lengths <= RANK_TOLERANCE * squares.sqrt(), 0.0, phi)
    total = (phi * rest.sqrt()).square().sum((1, 2), keepdim=True)  # |S|^2
    factor = yield from limit_growth(shard, state, "rest_norm", options.norm_growth_limit, total)
    return (phi * factor / found.safe_scale).clamp_max(LARGEST)
