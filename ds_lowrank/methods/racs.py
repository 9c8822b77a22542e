"""RACS (Gong et al., arXiv 2502.07752, Algorithm 1): the gradient, with its rows and its columns scaled.

``s q^T`` is nearly the best approximation of rank one to the gradient's squares. With the compressed dimension second,
``H`` is kept x compressed, s has a number for each kept row and q for each compressed one. In the paper, where the
smaller dimension comes first, q belongs to it as well:

    q' <- 1;  then 5 times:  s' <- diag(H Q' H^T) / |q'|^2,  q' <- diag(H^T S' H) / |s'|^2               (Equation 16)
    s  <- beta s + (1 - beta) s',  q <- beta q + (1 - beta) q'
    H~ <- diag(s)^(-1/2) H diag(q)^(-1/2)
    H~ <- H~ * gamma |H~_before| / |H~|        if |H~| > gamma |H~_before|: the norm-growth limiter
    W  <- W - lr * alpha * H~

Only sums over the rows and the columns of ``H * H`` are needed. The roots of s and q are what is stored: they stay in
the range of fp32 where squares of small gradients do not.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import ClassVar

import torch
from pydantic import Field

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.norm_growth import limit_growth, norm_spec
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient, safe_ratio
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.elementwise import along, largest_magnitudes
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense

LARGEST_SQUARES = 1e34
"""The share of one piece in a squared norm counts as at most this: the sum of all stays in the range of fp32."""


class RacsOptions(Options):
    """The keys of RACS."""

    beta: float = Field(0.9, ge=0, lt=1)
    """Of the averages s and q."""
    iterations: int = Field(5, gt=0, strict=True)
    """How often Equation 16 is applied in each step."""
    scale: float = Field(0.05, ge=0, allow_inf_nan=False)
    """The paper's alpha."""
    norm_growth_limit: float | None = Field(1.01, ge=1, allow_inf_nan=False)
    """gamma; None switches the limiter off."""


class RacsMethod(Method):
    """RACS on the matrices of a stack."""

    name: ClassVar[str] = "Racs"
    Options: ClassVar[type[RacsOptions]] = RacsOptions

    @staticmethod
    def state(shard: MatrixShard, options: RacsOptions, rank: int) -> StateSpec:
        """The roots of s and q, a number for each row and each column, and the norm of the last ``H~``."""
        return {
            "root_s": TensorSpec(shard.kept, 1),
            "root_q": TensorSpec(shard.compressed, 1),
            "scaled_norm": norm_spec(shard),
        }

    @staticmethod
    def needs_gradient(options: RacsOptions) -> str:
        """A step scales the gradient itself."""
        return "it scales the gradient itself, which every rank needs whole: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: RacsOptions) -> Program[ProjectedGradient]:
        """Nothing is projected: only how large the gradient is has to be known before the step is decided."""
        yield from ()
        return ProjectedGradient(largest_magnitudes(shard), due=False)

    @staticmethod
    def update(shard: MatrixShard, state: State, options: RacsOptions, found: ProjectedGradient) -> Program[Dense]:
        """The update ``alpha * H~``."""
        s, q = yield from fixed_point(shard, options.iterations, found.safe_scale)
        old, new = sqrt(options.beta), sqrt(1 - options.beta)
        for key, root in (("root_s", found.safe_scale * s.sqrt()), ("root_q", q.sqrt())):
            state[key].copy_(torch.hypot(old * state[key], new * root))  # of beta s + (1 - beta) s'
        roots = yield shard.kept.all_gather(state["root_s"]), shard.compressed.all_gather(state["root_q"])
        root_s, root_q = (torch.where(root == 0, inf, root) for root in roots)  # without a gradient so far: not moved

        def scaled(piece: Piece) -> torch.Tensor:
            values = shard.gradient.values_at(piece).float() / along(shard, shard.kept, piece, root_s)
            return values.div_(along(shard, shard.compressed, piece, root_q))

        if options.norm_growth_limit is None:
            return Dense(scaled, options.scale)
        squares = torch.zeros(len(shard), 1, 1, dtype=torch.float32, device=shard.device)
        for piece in shard.gradient.dense_pieces:
            norms = torch.linalg.vector_norm(scaled(piece), dim=(1, 2), keepdim=True, dtype=torch.float64)
            squares[piece.matrices] += norms.square().clamp_max(LARGEST_SQUARES).float()
        factor = yield from limit_growth(shard, state, "scaled_norm", options.norm_growth_limit, squares)
        return Dense(lambda piece: scaled(piece).mul_(factor[piece.matrices]), options.scale)


def fixed_point(
    shard: MatrixShard, iterations: int, safe_scale: torch.Tensor
) -> Program[tuple[torch.Tensor, torch.Tensor]]:
    """Equation 16, some ``iterations`` of it: s' over the squared safe scale, and q', for this step's gradients.

    Returns:
        matrices x owned kept rows x 1, and compressed ones, fp32; zeros for a gradient of zeros.
    """
    kept, compressed = shard.kept, shard.compressed
    q = torch.ones(len(shard), compressed.held_rows, 1, dtype=torch.float32, device=shard.device)
    q_squares = torch.full_like(safe_scale, compressed.size)  # |q'|^2
    for left in reversed(range(iterations)):
        own_s = yield kept.reduce_scatter(squares_times(shard, kept, compressed, q, safe_scale))
        own_s = safe_ratio(own_s, q_squares)
        s, s_squares = yield kept.all_gather(own_s), shard.all_reduce(own_s.square().sum(1, keepdim=True))
        own_q = yield compressed.reduce_scatter(squares_times(shard, compressed, kept, s, safe_scale))
        own_q = safe_ratio(own_q, s_squares)
        if left:
            q, q_squares = yield compressed.all_gather(own_q), shard.all_reduce(own_q.square().sum(1, keepdim=True))
    return own_s, own_q


def squares_times(
    shard: MatrixShard, axis: Axis, other: Axis, factors: torch.Tensor, safe_scale: torch.Tensor
) -> torch.Tensor:
    """This rank's contribution to the sums of the squared gradients along one dimension, weighted by the other.

    Args:
        shard: the stack, with this step's gradients.
        axis: along which the sums are.
        other: over which they are taken.
        factors: the weights: matrices x held rows of ``other`` x 1, fp32.
        safe_scale: of the gradients: matrices x 1 x 1, fp32.

    Returns:
        matrices x held rows of ``axis`` x 1, fp32.
    """
    sums = torch.zeros(len(shard), axis.held_rows, 1, dtype=torch.float32, device=shard.device)
    for piece in shard.gradient.dense_pieces:
        squares = (piece.values.float() / safe_scale[piece.matrices]).square_()
        squares.mul_(along(shard, other, piece, factors))  # no product: sums have the same bits in stacks of any size
        found = squares.sum(2 if axis is shard.rows else 1).unsqueeze(2)
        sums[piece.matrices, shard.held(axis, piece.rectangle)] += found
    return sums
