"""GUM (Pan et al., arXiv 2510.17802): Muon's momentum in a subspace, and of a few random matrices outside it.

With the compressed dimension second, ``H`` is kept x compressed and ``P`` compressed x r. Every K steps a coin that
falls on "whole" with probability q is thrown for every matrix:

    every K steps    P <- leading subspace of H,  M <- 0
    low rank         M <- beta M + H P / (1 - q)             kept x r
                     W <- W - lr * scale * NS(M) P^T
    whole            M <- beta M + (H - H P P^T) / q         kept x compressed
                     W <- W - lr * scale * NS(M)

so that what is added to M is H on average over coins. NS is Muon's Newton-Schulz iteration. With q = 1 there is nothing
to make up for, and no P: ``M <- beta M + H``, which is Muon.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.sketch import name_hash
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.orthogonalize import Orthogonalization, ShapeFactor, orthogonalized, shape_factor
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.range_finder import RangeFinderOptions, leading_basis
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import project_on
from ds_lowrank.methods.blocks.whole import everywhere, own_rows, whole_orthogonalized, whole_update
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program, concurrently
from ds_lowrank.sharding.updates import Factors, Update


class GumOptions(RangeFinderOptions):
    """The keys of GUM."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*RangeFinderOptions.fixed_on_resume, "rank", "full_share")

    rank: int = Field(128, gt=0, strict=True)
    """Columns of ``P``, r."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """K, in optimizer steps."""
    full_share: float = Field(0.1, ge=0, le=1)
    """q, the probability that a matrix is stepped whole for K steps; 1 is Muon."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """beta."""
    nesterov: bool = Field(False, strict=True)
    """Whether NS is taken of ``beta M`` plus what was added to M, as Muon does, instead of M."""
    orthogonalization: Orthogonalization = "newton_schulz"
    """NS, or the exact polar factor."""
    projector: Literal["randomized", "svd"] = "randomized"
    """How the leading subspace is found: by a randomized range finder, or by an exact SVD on one rank."""
    adjust_lr_fn: ShapeFactor = "none"
    """What the update of an m x n weight is multiplied by: 1, ``sqrt(max(1, m / n))``, or ``0.2 sqrt(max(m, n))``."""
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the update of a projected matrix, not its weight decay."""

    def is_whole(self, name: str, period: int) -> bool:
        """The coin: whether a matrix is stepped whole in a period. A function of seed, name and period.

        Args:
            name: of the matrix.
            period: steps over K.
        """
        return name_hash("full_share", self.seed, name, period) < self.full_share * 2**63


@dataclass
class WholeGradient(ProjectedGradient):
    """The gradient of matrices that are stepped whole: ``projected`` is H, matrices x owned kept rows x compressed.

    Attributes:
        own: the rows of ``P`` that this rank owns: matrices x owned compressed rows x r, fp32; None for Muon.
        basis: all rows of ``P``: matrices x compressed x r, fp32; None for Muon.
    """

    own: torch.Tensor | None = field(kw_only=True)
    basis: torch.Tensor | None = field(kw_only=True)

    @property
    def refreshed(self) -> bool:
        """Whether a new period begins. With a gradient of zeros the last one goes on."""
        return self.due and not self.is_zero


class GumMethod(Method):
    """GUM on the matrices of a stack."""

    name: ClassVar[str] = "Gum"
    Options: ClassVar[type[GumOptions]] = GumOptions

    @staticmethod
    def rank(shape: tuple[int, int], options: GumOptions) -> int:
        """r, which the state starts with; 0 for a matrix that is stepped whole, as all are with Muon."""
        return 0 if options.full_share == 1 else min(options.rank, *shape)

    @classmethod
    def rank_text(cls, shape: tuple[int, int], options: GumOptions) -> str:
        """The rank as the role table shows it."""
        return "full" if options.full_share == 1 else super().rank_text(shape, options)

    @staticmethod
    def phase(name: str, step: int, options: GumOptions) -> bool:
        """Whether a period begins in which the matrix is stepped whole."""
        due = options.full_share < 1 and step % options.update_proj_gap == 0
        return due and options.is_whole(name, step // options.update_proj_gap)

    @staticmethod
    def state(shard: MatrixShard, options: GumOptions, rank: int) -> StateSpec:
        """``P`` compressed x r, and ``M`` kept x r or, at rank 0, kept x compressed; ``M`` alone with Muon."""
        momentum = options.first_moment_spec(shard.kept, rank or shard.compressed.size)
        if options.full_share == 1:
            return {"momentum_buffer": momentum}
        columns = min(options.rank, *shard.shape)
        return {"basis": options.basis_spec(shard, columns), "momentum_buffer": momentum, "rank": rank}

    @staticmethod
    def needs_gradient(options: GumOptions) -> str:
        """A matrix that is stepped whole needs all of its gradient."""
        return "it steps some matrices whole, with all of their gradients: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: GumOptions) -> Program[ProjectedGradient]:
        """``R = H P``, or H itself, with a new ``P`` and a new coin if a period begins."""
        if options.full_share == 1:
            return WholeGradient((yield from own_rows(shard)), False, own=None, basis=None)
        step, own, whole = state["step"], state["basis"], state["rank"] == 0
        due = step % options.update_proj_gap == 0
        if due:
            whole = options.is_whole(shard.names[0], step // options.update_proj_gap)  # the same for all
            rank, projector = own.shape[2], options.projector
            own = yield from leading_basis(shard, rank, projector, options.seed, step, options.power_steps)
        if not whole:
            return (yield from project_on(shard, own, due, options))  # R = H P
        gradient, basis = yield from concurrently(own_rows(shard), everywhere(shard, own))
        return WholeGradient(gradient, due, own=own, basis=basis)

    @staticmethod
    def update(shard: MatrixShard, state: State, options: GumOptions, found: Any) -> Program[Update]:
        """The orthogonalized momentum, lifted if it is in the subspace."""
        q = options.full_share
        if found.refreshed:
            rank = 0 if isinstance(found, WholeGradient) else found.own.shape[2]
            momentum = found.own.new_zeros(len(shard), shard.kept.owned_rows, rank or shard.compressed.size)
            state |= {"basis": found.own, "momentum_buffer": momentum, "rank": rank}
        momentum = state["momentum_buffer"].mul_(options.momentum)
        # Zeros that were found may be of the next period's size.
        added = torch.zeros_like(momentum) if found.is_zero else weighted(found, q)
        momentum.add_(added)
        looked_at = added.add(momentum, alpha=options.momentum) if options.nesterov else momentum
        scale = options.scale * shape_factor(shard, options.adjust_lr_fn)
        if q == 1 or state["rank"] == 0:
            held = yield from whole_orthogonalized(shard, looked_at, options.orthogonalization)  # NS(M)
            if q < 1:  # M has no direction of P, but rounding, which NS enlarges
                basis = (yield from everywhere(shard, state["basis"])) if found.is_zero else found.basis
                held = held - held @ basis @ basis.mT
            return whole_update(shard, held, scale)
        basis = (yield shard.compressed.all_gather(state["basis"])) if found.is_zero else found.basis
        direction = yield from orthogonalized(shard, looked_at, options.orthogonalization)
        return Factors((yield shard.kept.all_gather(direction)), basis, scale)  # NS(M) P^T


def weighted(found: Any, q: float) -> torch.Tensor:
    """What is added to M: ``H P / (1 - q)``, or ``(H - H P P^T) / q``; H with Muon.

    Args:
        found: in the gradient.
        q: the probability that a matrix is stepped whole.

    Returns:
        matrices x owned kept rows x the columns of M, fp32.
    """
    added: torch.Tensor = found.projected
    if not isinstance(found, WholeGradient):
        return added / (1 - q)
    if found.basis is None:
        return added
    return (added - added @ found.basis @ found.basis.mT) / q
