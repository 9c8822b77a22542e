"""Tandem, this project's own: momentum where the gradient is strong, the gradient itself where it is weak.

With the compressed dimension second, ``H`` is kept x compressed, and ``Q`` compressed x r; D and d are the sides:

    every T steps    Q <- leading subspace of H,  M <- M Q_old^T Q
    R <- H Q
    M <- beta M + (1 - beta) R
    N <- polar factor of beta M + (1 - beta) R           all singular values 1, so |N|^2 = r
    E_i <- (H_i - R_i Q^T) / |H_i - R_i Q^T|             every row of what is left, so |E|^2 = D
    X <- N Q^T + c sqrt((d - r) / D) E                   what is outside has d - r dimensions, and as much of the length
    W <- W - lr * scale * 0.2 sqrt(D d / (r + c^2 (d - r))) X

The last factor makes the root mean square of an update about 0.2, which is about that of AdamW's, for every shape and
rank. A step, ``lr * scale * 0.2``, is at most ``tau`` of the root mean square of ``W``. There is no second moment, and
of the momentum only the part in the subspace: r (D + d) numbers.

What is from where: the orthogonalized momentum in a subspace is SUMO's (arXiv 2505.24749), a rest of the gradient
beside it is Fira's (arXiv 2410.01623), rows of one length are SCALE's (arXiv 2506.16659), the root mean square is that
of Moonlight's Muon (arXiv 2502.16982), and that weights measure a step is from LARS (arXiv 1708.03888).
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

import torch
from pydantic import Field

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.orthogonalize import orthogonalized
from ds_lowrank.methods.blocks.projection import safe_ratio
from ds_lowrank.methods.blocks.range_finder import RangeFinderOptions, randomized_range
from ds_lowrank.methods.blocks.rest import row_squares, with_rest
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import BasisPlacement, Projection, basis_of_step, project_on, take_basis
from ds_lowrank.methods.blocks.weight_size import size_of, weight_squares
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program, concurrently
from ds_lowrank.sharding.updates import Factors, Update

LENGTH = 0.2
"""The root mean square of an update at a scale of one."""
LARGEST = torch.finfo(torch.float32).max


class TandemOptions(RangeFinderOptions):
    """The keys of Tandem."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*RangeFinderOptions.fixed_on_resume, "rank")

    rank: int = Field(128, gt=0, strict=True)
    """Columns of ``Q``, r."""
    update_proj_gap: int = Field(25, gt=0, strict=True)
    """T, in optimizer steps."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """beta."""
    rest_weight: float = Field(2.0, ge=0, allow_inf_nan=False)
    """c: how long a direction outside the subspace is, relative to one in it."""
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the update of a projected matrix, not its weight decay."""
    max_relative_step: float | None = Field(0.05, gt=0, allow_inf_nan=False)
    """tau: the longest step of a matrix relative to its weights, in root mean squares; null for none."""
    basis_placement: BasisPlacement = "partitioned"
    """Whether a rank stores the rows of a basis that it owns, or keeps all that it computes with between refreshes."""


class TandemMethod(Method):
    """Tandem on the matrices of a stack."""

    name: ClassVar[str] = "Tandem"
    Options: ClassVar[type[TandemOptions]] = TandemOptions

    @staticmethod
    def state(shard: MatrixShard, options: TandemOptions, rank: int) -> StateSpec:
        """``Q``, compressed x r, and ``M``, kept x r."""
        return {
            "basis": options.basis_spec(shard, rank),
            "momentum_buffer": options.first_moment_spec(shard.kept, rank),
        }

    @staticmethod
    def needs_gradient(options: TandemOptions) -> str:
        """A step adds what the subspace leaves out of the gradient."""
        return "it steps along what the subspace leaves out of the whole gradient: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: TandemOptions) -> Program[Projection]:
        """``R = H Q``, on a new basis if it is due."""
        own, step = state["basis"], state["step"]
        due = step % options.update_proj_gap == 0
        if due:
            own = yield from randomized_range(shard, own.shape[2], options.seed, step, options.power_steps)
        return (yield from project_on(shard, own, due, options))  # R = H Q

    @staticmethod
    def update(shard: MatrixShard, state: State, options: TandemOptions, found: Projection) -> Program[Update]:
        """The orthogonalized momentum, lifted, and the rest with rows of one length."""
        basis, momentum = (yield from basis_of_step(shard, state, options, found)), state["momentum_buffer"]
        if found.refreshed:
            yield from take_basis(shard, state, found.own, momentum)
        beta = options.momentum
        momentum.lerp_(found.projected, 1 - beta)  # M
        direction, share = yield from concurrently(
            orthogonalized(shard, found.projected.lerp(momentum, beta), "exact"), share_of_step(shard, options)
        )
        direction = share * direction  # N
        rank, c, size = basis.shape[2], options.rest_weight, shard.shape[0] * shard.shape[1]
        outside = min(shard.shape) - rank
        length = options.scale * LENGTH * sqrt(size / (rank + c * c * outside))
        if not c * outside:
            return Factors((yield shard.kept.all_gather(direction)), basis, length)
        _, squares = yield from row_squares(shard, options, found)
        lengths = squares.sqrt() * found.safe_scale
        shares = c * sqrt(outside / shard.kept.size) * safe_ratio(torch.ones_like(lengths), lengths)
        shares = (share * shares).clamp_max(LARGEST)
        return (yield from with_rest(shard, direction, found.projected, basis, shares, length))


def share_of_step(shard: MatrixShard, options: TandemOptions) -> Program[torch.Tensor]:
    """What is taken of a step so that it is not longer than ``tau`` times the weights: matrices x 1 x 1, fp32.

    Args:
        shard: the stack, with its weights.
        options: with ``max_relative_step``, the learning rate and ``scale``.
    """
    step = options.effective_lr * options.scale * LENGTH
    if options.max_relative_step is None or step == 0:
        return torch.ones(len(shard), 1, 1, dtype=torch.float32, device=shard.device)
    squares = yield shard.all_reduce(weight_squares(shard))
    return (options.max_relative_step / step * size_of(shard, squares)).clamp_max(1.0)
