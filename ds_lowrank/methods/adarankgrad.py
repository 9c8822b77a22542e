"""AdaRankGrad (Refael et al., arXiv 2410.17881): Adam in a subspace whose rank follows the gradient.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x r, with an r of its own for
every matrix and interval:

    when the subspace is used up    Q <- range of H, of rank_max columns                                    (SSRF)
                                    r <- the smallest with |H - H Q_r Q_r^T|^2 <= residual_tol * |H|^2      (IASS)
                                    C <- Q_old^T Q_r;  M <- M C;  V <- V (C * C)
    R <- H Q
    N <- Adam(R)
    W <- W - lr * scale * N Q^T
    used up: |R| <= grad_norm_tol, or update_proj_gap steps have passed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.energy import leading_coordinates, numerical_rank, smallest_rank, spectrum
from ds_lowrank.linalg.moments import adam
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.range_finder import randomized_range
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.subspace import Projection, project_on
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program, concurrently
from ds_lowrank.sharding.updates import Factors, Update


class AdaRankGradOptions(Options):
    """The paper's own knobs."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*Options.fixed_on_resume, "rank_max")

    rank_max: int = Field(128, gt=0, strict=True)
    rank_min: int = Field(1, gt=0, strict=True)
    residual_tol: float = Field(0.2, gt=0, lt=1)
    """eta: how much of the gradient's squared norm a subspace may leave out."""
    rank_multiple: int = Field(1, gt=0, strict=True)
    """Ranks are rounded up to a multiple of it, but not beyond ``rank_max`` and the matrix's smaller dimension."""
    never_grow: bool = Field(False, strict=True)
    """Whether a rank may only shrink."""
    grad_norm_tol: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """The norm of the projected gradient at which a subspace is used up."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """A subspace lasts at most so many optimizer steps."""
    second_moment: Literal["abs", "clamp", "squared"] = "squared"
    """What a change of basis C does to V: ``|V C|``, ``max(V C, 0)`` or ``V (C * C)``."""
    scale: float = Field(0.25, ge=0, allow_inf_nan=False)
    """Multiplies the update of a projected matrix, not its weight decay."""

    def model_post_init(self, context: Any) -> None:
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
    """A projection on a subspace whose rank was chosen for it."""

    rank: int = field(kw_only=True)


class AdaRankGrad(Method):
    """AdaRankGrad on one matrix."""

    name: ClassVar[str] = "AdaRankGrad"
    Options: ClassVar[type[AdaRankGradOptions]] = AdaRankGradOptions

    @staticmethod
    def rank(shape: tuple[int, int], options: AdaRankGradOptions) -> int:
        return min(options.rank_max, *shape)

    @classmethod
    def rank_text(cls, shape: tuple[int, int], options: AdaRankGradOptions) -> str:
        return f"at most {cls.rank(shape, options)}"

    @staticmethod
    def state(shard: MatrixShard, options: AdaRankGradOptions, rank: int) -> StateSpec:
        return {
            "basis": TensorSpec(shard.compressed, rank),
            "exp_avg": options.first_moment_spec(shard.kept, rank),
            "exp_avg_sq": options.second_moment_spec(shard.kept, rank),
            "rank": rank,
            "age": 0,
            "used_up": 1,
        }

    @staticmethod
    def project(shard: MatrixShard, state: State, options: AdaRankGradOptions, step: int) -> Program[Projection]:
        if state["used_up"]:
            return (yield from new_subspace(shard, options, state["rank"], step))
        return (yield from project_on(shard, state["basis"], refreshed=False))

    @staticmethod
    def update(
        shard: MatrixShard, state: State, options: AdaRankGradOptions, step: int, found: Projection
    ) -> Program[Update]:
        projected, basis = found.projected, found.basis
        if found.is_zero:
            # No subspace can be read off it: the old one stays, and a due change is tried again in the next step.
            found.refreshed = False
            basis = yield shard.compressed.all_gather(state["basis"])
            projected = projected.new_zeros(projected.shape[0], state["rank"])
        elif isinstance(found, AdaptiveProjection):
            yield from change_subspace(shard, state, options, found)
        direction = adam(state["exp_avg"], state["exp_avg_sq"], projected, options.betas, options.eps, step + 1)
        squares = projected.square().sum().view(1, 1)
        direction, squares = yield shard.kept.all_gather(direction), shard.all_reduce(squares)
        state["age"] += 1
        # All ranks were sent the same bits, and so decide alike.
        converged = squares.sqrt().item() <= options.grad_norm_tol
        state["used_up"] = int(converged or state["age"] >= options.update_proj_gap)
        return Factors(direction, basis, options.scale)


def new_subspace(
    shard: MatrixShard, options: AdaRankGradOptions, present: int, step: int
) -> Program[AdaptiveProjection]:
    """The smallest subspace of the gradient that leaves out no more than ``residual_tol``.

    A range of ``rank_max`` columns is found once; the singular values of the gradient within it give the residual of
    every smaller rank. The factoring rank chooses and tells the others.

    Args:
        present: the rank of the subspace that is used up.
    """
    most = AdaRankGrad.rank(shard.shape, options)
    own, unit = yield from concurrently(randomized_range(shard, most, options.seed, step), largest_element(shard))
    basis = yield shard.compressed.all_gather(own)
    projected, norms = yield (
        shard.kept.reduce_scatter(shard.times(basis)),
        shard.kept.reduce_scatter(shard.kept_squares(unit)),
    )
    whole, norms = yield shard.kept.gather_to_root(projected), shard.kept.gather_to_root(norms)
    within, rank = torch.zeros(0, most, device=shard.device), torch.zeros(1, 1, device=shard.device)
    if shard.rank == shard.root:
        within, chosen = fitting_subspace(whole / unit, norms, options, present)
        rank.fill_(chosen)
    within, rank = yield shard.replicated_axis(most).broadcast_from_root(within), shard.all_reduce(rank)
    chosen = int(rank.item())
    within = shard.or_zeros(within, most)[:, :chosen]
    return AdaptiveProjection(projected @ within, True, own=own @ within, basis=basis @ within, rank=chosen)


def largest_element(shard: MatrixShard) -> Program[torch.Tensor]:
    """About the largest magnitude in the gradient, the same on all ranks: keeps squares in the range of fp32."""
    largest = shard.flat_gradient.abs().max() if shard.part.numel else torch.zeros((), device=shard.device)
    total: torch.Tensor = yield shard.all_reduce(largest.float().view(1, 1))
    return total.clamp_min(torch.finfo(torch.float32).tiny)


def fitting_subspace(
    projected: torch.Tensor, norms: torch.Tensor, options: AdaRankGradOptions, present: int
) -> tuple[torch.Tensor, int]:
    """The rank, and the coordinates of the subspace within the range that was found.

    Args:
        projected: kept x most, the whole gradient on that range.
        norms: kept x 1, squared norms of the gradient's rows, in the same unit.
        present: a rank that ``never_grow`` may not exceed.

    Returns:
        most x most, of which the first ``rank`` columns are used, and the rank.
    """
    most = projected.shape[1]
    values, vectors = spectrum(projected)
    if not values.isfinite().all():
        return torch.full((most, most), torch.nan, device=projected.device), most
    rank = max(smallest_rank(values, norms.double().sum(), options.residual_tol), options.rank_min)
    rank = -(-rank // options.rank_multiple) * options.rank_multiple
    if options.never_grow:
        rank = min(rank, max(present, options.rank_min))
    rank = max(1, min(rank, most, numerical_rank(values)))
    within = torch.zeros(most, most, device=projected.device)
    within[:, :rank] = leading_coordinates(vectors, rank)
    return within, rank


def change_subspace(
    shard: MatrixShard, state: State, options: AdaRankGradOptions, found: AdaptiveProjection
) -> Program[None]:
    """Carry both moments into the new subspace; the state takes its size."""
    rotation = yield from shard.replicated_sum(state["basis"].T @ found.own)
    first = state["exp_avg"] @ rotation
    second = state["exp_avg_sq"]
    match options.second_moment:
        case "abs":
            second = (second @ rotation).abs()
        case "clamp":
            second = (second @ rotation).clamp_min(0)
        case "squared":
            second = second @ rotation.square()
    state["exp_avg"], state["exp_avg_sq"] = first, second
    state["basis"], state["rank"], state["age"] = found.own, found.rank, 0
