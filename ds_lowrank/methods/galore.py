"""GaLore (Zhao et al., arXiv 2403.03507, Algorithm 2): Adam in a subspace of the gradient.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x rank:

    every T steps    Q <- leading subspace of H
    R <- H Q         (Definition 3.6, one side)
    N <- Adam(R)
    W <- W - lr * scale * N Q^T
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.moments import adam, rotate
from ds_lowrank.linalg.orthonormal import leading_singular_vectors, orthonormal
from ds_lowrank.linalg.sketch import gaussian, name_hash
from ds_lowrank.methods.base import Options, Projection, State
from ds_lowrank.sharding.matrix import Factors, MatrixShard, Side
from ds_lowrank.sharding.reduce import Program


class GaLoreOptions(Options):
    """GaLore's own keys, in its spelling, beside the common ones."""

    rank: int = Field(128, gt=0, strict=True)
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """T, in optimizer steps."""
    scale: float = Field(0.25, ge=0, allow_inf_nan=False)
    """The paper's alpha: multiplies the update of a projected matrix, not its weight decay."""
    proj_type: Literal["std", "reverse_std", "left", "right"] = "std"
    """``std`` compresses the smaller dimension (columns where both are equal), ``reverse_std`` the other."""
    projector: Literal["randomized", "svd"] = "randomized"
    moments: Literal["keep", "rotate"] = "keep"
    """What a refresh does to Adam's moments: the official code keeps them in the old coordinates."""
    stagger: bool = False
    """Spread the refreshes of the matrices over the interval instead of doing them all in one step."""


class GaLore:
    """GaLore on one matrix."""

    name: ClassVar[str] = "GaLore"
    Options: ClassVar[type[Options]] = GaLoreOptions

    @staticmethod
    def side(shape: tuple[int, int], options: GaLoreOptions) -> Side:
        tall = shape[0] >= shape[1]
        match options.proj_type:
            case "std":
                return "right" if tall else "left"
            case "reverse_std":
                return "left" if tall else "right"
            case side:
                return side

    @staticmethod
    def rank(shape: tuple[int, int], options: GaLoreOptions) -> int:
        return min(options.rank, *shape)

    @staticmethod
    def init_state(shard: MatrixShard, options: GaLoreOptions, device: torch.device) -> State:
        rank = GaLore.rank(shard.shape, options)
        moments = (shard.kept.owned_rows, rank)
        return {
            "basis": torch.zeros(shard.compressed.owned_rows, rank, device=device),
            "exp_avg": torch.zeros(moments, dtype=options.moment_dtype, device=device),
            "exp_avg_sq": torch.zeros(moments, dtype=options.moment_dtype, device=device),
        }

    @staticmethod
    def project(shard: MatrixShard, state: State, options: GaLoreOptions, step: int) -> Program[Projection]:
        own = state["basis"]
        if refresh_due(shard.name, options, step):
            own = yield from new_basis(shard, options, step)
        basis = yield shard.compressed.gather(own)
        projected = yield shard.kept.reduce(shard.times(basis))
        return Projection(own, basis, projected)

    @staticmethod
    def update(
        shard: MatrixShard, state: State, options: GaLoreOptions, step: int, seen: Projection
    ) -> Program[Factors]:
        basis = seen.basis
        if seen.is_zero:
            # No subspace can be read off it: the old basis stays until the next refresh.
            basis = yield shard.compressed.gather(state["basis"])
        elif refresh_due(shard.name, options, step):
            yield from change_basis(shard, state, seen.own, rotating=options.moments == "rotate" and step > 0)
        direction = adam(state["exp_avg"], state["exp_avg_sq"], seen.projected, options.betas, options.eps, step + 1)
        direction = yield shard.kept.gather(direction)
        return Factors(direction, basis, options.scale)


def refresh_due(name: str, options: GaLoreOptions, step: int) -> bool:
    """Steps 0, T, 2T, ...; staggered, the later ones are moved by an offset that is a function of the name."""
    offset = name_hash("stagger", name) % options.update_proj_gap if options.stagger else 0
    return step == 0 or (step + offset) % options.update_proj_gap == 0


def new_basis(shard: MatrixShard, options: GaLoreOptions, step: int) -> Program[torch.Tensor]:
    """This rank's own rows of an orthonormal basis of the gradient's leading subspace, compressed x rank."""
    rank = GaLore.rank(shard.shape, options)
    if options.projector == "svd":
        gradient = yield shard.rows.sum_at_factor(shard.block())
        return (yield shard.compressed.hand_out(leading_singular_vectors(gradient, rank, shard.side)))
    return (yield from randomized_range(shard, rank, options.seed, step))


def randomized_range(shard: MatrixShard, rank: int, seed: int, counter: int) -> Program[torch.Tensor]:
    """Randomized range finder with one power step (Halko et al., arXiv 0909.4061, Algorithm 4.4).

    Both halves of ``H^T (H sketch)`` are orthonormalised: directions ``k`` times weaker than the strongest are then
    found to ``k`` rounding errors instead of ``k^2``, whichever way the sums are split over ranks.

    Returns:
        This rank's own rows of the basis, compressed x rank.
    """
    tall = yield shard.kept.reduce(shard.times(held_sketch(shard, rank, seed, counter)))
    tall = yield shard.kept.collect(tall)
    tall = yield shard.kept.hand_out(orthonormal(tall))
    tall = yield shard.kept.gather(tall)
    wide = yield shard.compressed.reduce(shard.transposed_times(tall))
    wide = yield shard.compressed.collect(wide)
    return (yield shard.compressed.hand_out(orthonormal(wide)))


def held_sketch(shard: MatrixShard, rank: int, seed: int, counter: int) -> torch.Tensor:
    """The rows of the random sketch, compressed x rank, that this rank's elements touch."""
    start, end = shard.compressed.held
    if start == end:
        return torch.empty(0, rank, device=shard.device)
    return gaussian(seed, shard.name, counter, shard.compressed.size, rank, shard.device)[start:end].clone()


def change_basis(shard: MatrixShard, state: State, new: torch.Tensor, rotating: bool) -> Program[None]:
    """Store this rank's own rows of a new basis and, if asked, carry the moments into it."""
    if rotating:
        rotation = yield from shard.total(state["basis"].T @ new)
        rotate(state["exp_avg"], state["exp_avg_sq"], rotation)
    state["basis"].copy_(new)
