"""AdaRankGrad (Refael et al., arXiv 2410.17881): Adam in a subspace whose rank follows the gradient.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x r, with an r of its own for
every matrix and interval:

    when the subspace is used up    Q <- range of H, of rank_max columns                                    (SSRF)
                                    r <- the smallest with |H - H Q_r Q_r^T|^2 <= residual_tol * |H|^2      (IASS)
                                    C <- Q_old^T Q_r;  M <- M C;  V <- V (C * C)
    R <- H Q
    N <- Adam(R)
    W <- W - lr * scale * N Q^T
    used up: |R| <= grad_norm_ratio_tol * |R at the change|, |R| <= grad_norm_tol, or update_proj_gap steps have passed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.energy import leading_coordinates, numerical_rank, smallest_rank, spectrum
from ds_lowrank.linalg.moments import adam
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.norm_growth import norm_spec
from ds_lowrank.methods.blocks.projection import safe_scale_of
from ds_lowrank.methods.blocks.range_finder import RangeFinderOptions, randomized_range
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import (
    BasisPlacement,
    Projection,
    basis_factors,
    basis_of_step,
    keep_gathered,
    project_on,
)
from ds_lowrank.sharding.elementwise import blocks, squared_norms
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program, concurrently
from ds_lowrank.sharding.updates import Factors, Update


class AdaRankGradOptions(RangeFinderOptions):
    """The keys of AdaRankGrad."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*RangeFinderOptions.fixed_on_resume, "rank_max")

    rank_max: int = Field(128, gt=0, strict=True)
    """The largest rank of a subspace."""
    rank_min: int = Field(1, gt=0, strict=True)
    """The smallest rank, if the gradient has so many directions."""
    residual_tol: float = Field(0.2, gt=0, lt=1)
    """eta: how much of the gradient's squared norm a subspace may leave out."""
    rank_multiple: int = Field(1, gt=0, strict=True)
    """Ranks are rounded up to a multiple of it, but not beyond ``rank_max`` and the matrix's smaller dimension."""
    never_grow: bool = Field(False, strict=True)
    """Whether a rank may only shrink."""
    grad_norm_ratio_tol: float = Field(0.25, ge=0, lt=1)
    """The share of its first projected gradient's norm at which a subspace is used up; 0 for none."""
    grad_norm_tol: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """The norm of the projected gradient at which a subspace is used up."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """The most optimizer steps that a subspace lasts."""
    second_moment: Literal["abs", "clamp", "squared"] = "squared"
    """What a change of basis C does to V: ``|V C|``, ``max(V C, 0)`` or ``V (C * C)``."""
    basis_placement: BasisPlacement = "partitioned"
    """Whether a rank stores the rows of a basis that it owns, or keeps all that it computes with between refreshes."""
    scale: float = Field(0.25, ge=0, allow_inf_nan=False)
    """Multiplies the update of a projected matrix, not its weight decay."""

    def model_post_init(self, context: Any) -> None:
        """Refuse ranks that contradict each other."""
        super().model_post_init(context)
        if self.rank_min > self.rank_max:
            raise ValueError(
                f"rank_min {self.rank_min} is above rank_max {self.rank_max}: set rank_min to at most {self.rank_max}"
            )
        if self.rank_multiple > self.rank_max:
            raise ValueError(
                f"rank_multiple {self.rank_multiple} is above rank_max {self.rank_max}: set it to at most that"
            )


@dataclass
class AdaptiveProjection(Projection):
    """A projection on a new subspace.

    Attributes:
        ranks: the rank that was chosen for each matrix; columns beyond it are zero.
        squares: ``|H Q|^2`` and ``|H|^2`` of the kept rows that this rank owns, over any factor: matrices x 2, fp32.
    """

    ranks: list[int] = field(kw_only=True)
    squares: torch.Tensor = field(kw_only=True)

    @property
    def tells_apart(self) -> list[int]:
        """Matrices of different ranks have states of different sizes."""
        return self.ranks

    def energies(self, shard: MatrixShard, options: AdaRankGradOptions) -> torch.Tensor:
        """What the rank was chosen by, which is known of summed gradients under any ``reduction``."""
        return self.squares


class AdaRankGradMethod(Method):
    """AdaRankGrad on the matrices of a stack."""

    name: ClassVar[str] = "AdaRankGrad"
    Options: ClassVar[type[AdaRankGradOptions]] = AdaRankGradOptions

    @staticmethod
    def rank(shape: tuple[int, int], options: AdaRankGradOptions) -> int:
        """The largest rank, which the state starts with."""
        return min(options.rank_max, *shape)

    @classmethod
    def rank_text(cls, shape: tuple[int, int], options: AdaRankGradOptions) -> str:
        """The rank as the role table shows it."""
        return f"at most {cls.rank(shape, options)}"

    @staticmethod
    def state(shard: MatrixShard, options: AdaRankGradOptions, rank: int) -> StateSpec:
        """``Q`` compressed x r, Adam's moments kept x r, the subspace's first ``|R|``, and how long it has lasted."""
        return {
            "basis": options.basis_spec(shard, rank),
            "exp_avg": options.first_moment_spec(shard.kept, rank),
            "exp_avg_sq": options.second_moment_spec(shard.kept, rank),
            "first_norm": norm_spec(shard),
            "rank": rank,
            "age": 0,
            "used_up": 1,
        }

    @staticmethod
    def needs_gradient(options: AdaRankGradOptions) -> None:
        """An ordinary step needs ``R = H Q`` only."""

    @staticmethod
    def factors(shard: MatrixShard, state: State, options: AdaRankGradOptions) -> Program[Sums | None]:
        """``Q``; None if it is used up."""
        return None if state["used_up"] else (yield from basis_factors(shard, state, options))

    @staticmethod
    def project(shard: MatrixShard, state: State, options: AdaRankGradOptions) -> Program[Projection]:
        """``R = H Q``, on a new subspace if the last one is used up."""
        if state["used_up"]:
            return (yield from new_subspace(shard, options, state["rank"], state["step"]))
        return (yield from project_on(shard, state["basis"], False, options))  # R = H Q

    @staticmethod
    def update(shard: MatrixShard, state: State, options: AdaRankGradOptions, found: Projection) -> Program[Update]:
        """Adam in the subspace, and whether it is used up. A change that finds only zeros is tried again next time."""
        basis, projected = (yield from basis_of_step(shard, state, options, found)), found.projected
        if found.is_zero:
            projected = projected.new_zeros(*projected.shape[:2], state["rank"])
        elif isinstance(found, AdaptiveProjection):
            rank = found.ranks[0]  # the same for all
            basis, projected = basis[..., :rank].contiguous(), projected[..., :rank].contiguous()
            shard.held_basis = None
            keep_gathered(shard, options, basis, is_new=True)
            yield from change_subspace(shard, state, options, found)
        moments = state["exp_avg"], state["exp_avg_sq"]
        eps, step = options.eps_at(state["step"] + 1), state["step"] + 1
        direction = adam(*moments, projected, options.betas, eps, step)  # N = Adam(R)
        squares = (projected / found.safe_scale).square().sum((1, 2), keepdim=True)
        of_owner = state["first_norm"].sum(1, keepdim=True)  # of the one rank that stores it; zero on the others
        direction, summed = yield shard.kept.all_gather(direction), shard.all_reduce(torch.cat([squares, of_owner], 2))
        norm, first = summed[..., :1].sqrt() * found.safe_scale, summed[..., 1:]
        if found.refreshed:
            first = norm
            state["first_norm"].copy_(norm.expand_as(state["first_norm"]))
        state["age"] += 1
        # All ranks were sent the same bits, and so decide alike.
        is_small = (norm <= options.grad_norm_tol) | (norm <= options.grad_norm_ratio_tol * first)
        used_up = is_small | (state["age"] >= options.update_proj_gap)
        if used_up.is_meta:  # where a step is costed, only age uses a subspace up
            used_up = torch.full((len(shard),), state["age"] >= options.update_proj_gap, dtype=torch.bool, device="cpu")
        state["used_up"] = used_up.view(-1).int().tolist()
        return Factors(direction, basis, options.scale)  # scale * N Q^T


def new_subspace(
    shard: MatrixShard, options: AdaRankGradOptions, present: int, step: int
) -> Program[AdaptiveProjection]:
    """The smallest subspace of each gradient that leaves out at most ``residual_tol``.

    A range of ``rank_max`` columns is found once; the singular values of the gradient within it give the residual of
    every smaller rank. The root chooses the rank and broadcasts it.

    Args:
        shard: the stack, with this step's gradient.
        options: with ``rank_max`` and the rules for the rank.
        present: the rank of the subspace that is used up.
        step: the number of steps so far, which seeds the range finder.
    """
    most = AdaRankGradMethod.rank(shard.shape, options)
    own, safe_scale = yield from concurrently(
        randomized_range(shard, most, options.seed, step, options.power_steps),  # SSRF
        safe_scale_of(shard),
    )
    basis = yield shard.compressed.all_gather(own)
    projected, norms = yield from concurrently(
        summed_product(shard, basis),
        summed_squared_norms(shard, safe_scale),
    )
    own_squares = norms.sum((1, 2))
    whole, norms = yield shard.kept.gather_to_root(projected), shard.kept.gather_to_root(norms)
    ranks = torch.zeros(len(shard), 1, 1, dtype=torch.float32, device=shard.device)
    rooted = torch.tensor(shard.rooted, dtype=torch.int64, device=shard.device)
    within, chosen = fitting_subspace(whole / safe_scale[rooted], norms, options, present)  # IASS
    ranks[rooted] = chosen.float().view(-1, 1, 1)
    within, ranks = yield shard.replicated_axis(most).broadcast_from_root(within), shard.all_reduce(ranks)
    within = shard.or_zeros(within, most)
    # On the meta device, where a step is costed and nothing is computed, every subspace has the largest rank.
    chosen_ranks = [most] * len(shard) if ranks.is_meta else [int(rank) for rank in ranks.view(-1).tolist()]
    projected = projected @ within
    squares = torch.stack([(projected / safe_scale).square().sum((1, 2)), own_squares], dim=1)
    return AdaptiveProjection(
        projected, True, own=own @ within, basis=basis @ within, ranks=chosen_ranks, squares=squares
    )


def summed_product(shard: MatrixShard, basis: torch.Tensor) -> Program[torch.Tensor]:
    """``H Q`` over all ranks: matrices x owned kept rows x rank, fp32."""
    projected: torch.Tensor = yield shard.kept.reduce_scatter(shard.times(basis))
    return projected


def summed_squared_norms(shard: MatrixShard, safe_scale: torch.Tensor) -> Program[torch.Tensor]:
    """Squared norms of the rows of ``H``, over ``safe_scale``: matrices x owned kept rows x 1, fp32.

    Squares are not linear: where ranks hold gradients of their own, these are summed first, the whole of them.
    """
    norms: torch.Tensor
    if shard.geometry.copies == 1:
        norms = yield shard.kept.reduce_scatter(squared_norms(shard, shard.kept, shard.gradient, safe_scale))
        return norms
    whole = yield shard.kept.reduce_scatter(blocks(shard, shard.kept))
    lengths = torch.linalg.vector_norm(whole, dim=2, keepdim=True, dtype=torch.float64) / safe_scale
    norms = lengths.square().float()
    return norms


def fitting_subspace(
    projected: torch.Tensor, norms: torch.Tensor, options: AdaRankGradOptions, present: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the ranks (IASS), and the coordinates of the subspaces within the ranges that were found.

    Args:
        projected: whole gradients on these ranges, over their safe scales: matrices x kept x most, fp32.
        norms: squared norms of the gradients' rows, over the same scales squared: matrices x kept x 1, fp32.
        options: with the rules for the rank.
        present: a rank that ``never_grow`` may not exceed.

    Returns:
        The coordinates, matrices x most x most, NaN where a gradient is not finite, and zero from column ``rank`` on;
        and the ranks, one for each matrix, int64.
    """
    most = projected.shape[2]
    values, vectors = spectrum(projected)
    ranks = smallest_rank(values, norms.double().sum((1, 2)), options.residual_tol).clamp_min(options.rank_min)
    ranks = -(-ranks // options.rank_multiple) * options.rank_multiple
    if options.never_grow:
        ranks = ranks.clamp_max(max(present, options.rank_min))
    ranks = torch.minimum(ranks.clamp_max(most), numerical_rank(values)).clamp_min(1)
    finite = values.isfinite().all(1)
    ranks = torch.where(finite, ranks, most)
    within = torch.where(finite.view(-1, 1, 1), leading_coordinates(vectors, ranks), torch.nan)
    return within, ranks


def change_subspace(
    shard: MatrixShard, state: State, options: AdaRankGradOptions, found: AdaptiveProjection
) -> Program[None]:
    """Carry both moments into the new subspace; the state takes its rank."""
    rank = found.ranks[0]  # the same for all
    own = found.own[..., :rank].contiguous()
    rotation = yield from shard.replicated_sum(state["basis"].mT @ own)  # C = Q_old^T Q_r
    first = state["exp_avg"] @ rotation  # M C
    second = state["exp_avg_sq"]
    match options.second_moment:
        case "abs":
            second = (second @ rotation).abs()
        case "clamp":
            second = (second @ rotation).clamp_min(0)
        case "squared":
            second = second @ rotation.square()  # V (C * C)
    state["exp_avg"], state["exp_avg_sq"] = first, second
    state["basis"], state["rank"], state["age"] = own, rank, 0
