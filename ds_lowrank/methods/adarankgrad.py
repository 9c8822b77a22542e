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
from ds_lowrank.methods.blocks.projection import safe_scale_of
from ds_lowrank.methods.blocks.range_finder import randomized_range
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.subspace import Projection, basis_of_step, project_on
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program, concurrently
from ds_lowrank.sharding.updates import Factors, Update


class AdaRankGradOptions(Options):
    """The keys of AdaRankGrad."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*Options.fixed_on_resume, "rank_max")

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
    grad_norm_tol: float = Field(1e-4, ge=0, allow_inf_nan=False)
    """The norm of the projected gradient at which a subspace is used up."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """The most optimizer steps that a subspace lasts."""
    second_moment: Literal["abs", "clamp", "squared"] = "squared"
    """What a change of basis C does to V: ``|V C|``, ``max(V C, 0)`` or ``V (C * C)``."""
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
        rank: the rank that was chosen for it.
    """

    rank: int = field(kw_only=True)


class AdaRankGradMethod(Method):
    """AdaRankGrad on one matrix."""

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
        """``Q`` compressed x r, Adam's moments kept x r, and how long the subspace has lasted."""
        return {
            "basis": TensorSpec(shard.compressed, rank),
            "exp_avg": options.first_moment_spec(shard.kept, rank),
            "exp_avg_sq": options.second_moment_spec(shard.kept, rank),
            "rank": rank,
            "age": 0,
            "used_up": 1,
        }

    @staticmethod
    def project(shard: MatrixShard, state: State, options: AdaRankGradOptions) -> Program[Projection]:
        """``R = H Q``, on a new subspace if the last one is used up."""
        if state["used_up"]:
            return (yield from new_subspace(shard, options, state["rank"], state["step"]))
        return (yield from project_on(shard, state["basis"], due=False))  # R = H Q

    @staticmethod
    def update(shard: MatrixShard, state: State, options: AdaRankGradOptions, found: Projection) -> Program[Update]:
        """Adam in the subspace, and whether it is used up. A change that finds only zeros is tried again next time."""
        basis, projected = (yield from basis_of_step(shard, state, found)), found.projected
        if found.is_zero:
            projected = projected.new_zeros(projected.shape[0], state["rank"])
        elif isinstance(found, AdaptiveProjection):
            yield from change_subspace(shard, state, options, found)
        moments = state["exp_avg"], state["exp_avg_sq"]
        direction = adam(*moments, projected, options.betas, options.eps, state["step"] + 1)  # N = Adam(R)
        squares = projected.square().sum().view(1, 1)
        direction, squares = yield shard.kept.all_gather(direction), shard.all_reduce(squares)
        state["age"] += 1
        # All ranks were sent the same bits, and so decide alike.
        converged = squares.sqrt().item() <= options.grad_norm_tol
        state["used_up"] = int(converged or state["age"] >= options.update_proj_gap)
        return Factors(direction, basis, options.scale)  # scale * N Q^T


def new_subspace(
    shard: MatrixShard, options: AdaRankGradOptions, present: int, step: int
) -> Program[AdaptiveProjection]:
    """The smallest subspace of the gradient that leaves out at most ``residual_tol``.

    A range of ``rank_max`` columns is found once; the singular values of the gradient within it give the residual of
    every smaller rank. The root chooses the rank and broadcasts it.

    Args:
        shard: the matrix, with this step's gradient.
        options: with ``rank_max`` and the rules for the rank.
        present: the rank of the subspace that is used up.
        step: the number of steps so far, which seeds the range finder.
    """
    most = AdaRankGradMethod.rank(shard.shape, options)
    own, safe_scale = yield from concurrently(
        randomized_range(shard, most, options.seed, step),  # SSRF
        safe_scale_of(shard),
    )
    basis = yield shard.compressed.all_gather(own)
    squared_norms = shard.squared_norms(shard.kept, shard.flat_gradient, safe_scale)
    projected, squared_norms = yield (
        shard.kept.reduce_scatter(shard.times(basis)),
        shard.kept.reduce_scatter(squared_norms),
    )
    whole, squared_norms = yield shard.kept.gather_to_root(projected), shard.kept.gather_to_root(squared_norms)
    within = torch.zeros(0, most, dtype=torch.float32, device=shard.device)
    rank = torch.zeros(1, 1, dtype=torch.float32, device=shard.device)
    if shard.rank == shard.root:
        within, chosen = fitting_subspace(whole / safe_scale, squared_norms, options, present)  # IASS
        rank.fill_(chosen)
    within, rank = yield shard.replicated_axis(most).broadcast_from_root(within), shard.all_reduce(rank)
    chosen = int(rank.item())
    within = shard.or_zeros(within, most)[:, :chosen]
    return AdaptiveProjection(projected @ within, True, own=own @ within, basis=basis @ within, rank=chosen)


def fitting_subspace(
    projected: torch.Tensor, norms: torch.Tensor, options: AdaRankGradOptions, present: int
) -> tuple[torch.Tensor, int]:
    """Choose the rank (IASS), and the coordinates of the subspace within the range that was found.

    Args:
        projected: the whole gradient on that range, over its safe scale: kept x most, fp32.
        norms: squared norms of the gradient's rows, over the same scale squared: kept x 1, fp32.
        options: with the rules for the rank.
        present: a rank that ``never_grow`` may not exceed.

    Returns:
        The coordinates, most x most, whose first ``rank`` columns are used, and the rank.
    """
    most = projected.shape[1]
    values, vectors = spectrum(projected)
    if not values.isfinite().all():
        return projected.new_full((most, most), torch.nan), most
    rank = max(smallest_rank(values, norms.double().sum(), options.residual_tol), options.rank_min)
    rank = -(-rank // options.rank_multiple) * options.rank_multiple
    if options.never_grow:
        rank = min(rank, max(present, options.rank_min))
    rank = max(1, min(rank, most, numerical_rank(values)))
    within = projected.new_zeros(most, most)
    within[:, :rank] = leading_coordinates(vectors, rank)
    return within, rank


def change_subspace(
    shard: MatrixShard, state: State, options: AdaRankGradOptions, found: AdaptiveProjection
) -> Program[None]:
    """Carry both moments into the new subspace; the state takes its rank."""
    rotation = yield from shard.replicated_sum(state["basis"].T @ found.own)  # C = Q_old^T Q_r
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
    state["basis"], state["rank"], state["age"] = found.own, found.rank, 0
