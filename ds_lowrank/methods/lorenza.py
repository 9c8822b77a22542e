"""LORENZA and AdaZo-SAM (Refael et al., arXiv 2502.19571): a projected step on the gradient where the loss is higher.

A few forward passes estimate in which direction of the subspace the loss climbs, the one backward pass is taken a step
in that direction away, and Adam applies its gradient to the weights themselves. With the compressed dimension second,
``Q`` compressed x r and ``F`` kept x r (the paper's R_t, transposed):

    Pi_j   = F diag(u_j) Q^T                                 u_j ~ N(0, I_r), j = 1..q, for all matrices at once
    c_j    = (f(W + mu Pi_j) - f(W - mu Pi_j)) / (2 mu)
    G_pert = 1/q sum_j c_j Pi_j
    H      = grad f(W + rho G_pert / |G_pert|)
    every T steps    Q <- range of H,  F <- range of H Q
    R <- H Q;  N <- Adam(R)
    W <- W - lr * scale * N Q^T                              Lorenza+ adds s (H - R Q^T)

What climbs is :mod:`ds_lowrank.optimizer.perturbation`, the same for every matrix; this file has the step, and the
directions of one matrix. Without a rank the directions are ``Pi_j ~ N(0, 1)`` and Adam is of full size: AdaZo-SAM.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from ds_lowrank.linalg.orthonormal import orthonormal
from ds_lowrank.methods.apollo import ratio
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.directions import Diagonal, Directions, FullSpace, GaussianInSubspace
from ds_lowrank.methods.blocks.full_rank_adam import full_rank_adam, full_rank_state
from ds_lowrank.methods.blocks.inner_optimizers import Adam
from ds_lowrank.methods.blocks.options import Ascent, Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.range_finder import randomized_range
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.subspace import Projection, project_on
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program, Request
from ds_lowrank.sharding.updates import Dense, Factors, Update


class LorenzaOptions(Options):
    """The paper's own knobs."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*Options.fixed_on_resume, "rank", "probe_form")

    rank: Annotated[int, Field(gt=0, strict=True)] | None = 128
    """None: AdaZo-SAM, on whole gradients."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """T, in optimizer steps."""
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the update of a projected matrix, not its weight decay."""
    probes: int = Field(1, ge=1, strict=True)
    """q"""
    probe_radius: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """mu"""
    perturbation_radius: float = Field(0.05, ge=0, allow_inf_nan=False)
    """rho; 0 takes the gradient at the weights and probes nothing."""
    two_sided: bool = Field(True, strict=True)
    """Whether a probe looks at both sides of the weights, or compares one side with the weights."""
    probe_form: Literal["diagonal", "gaussian"] = "diagonal"
    """``F diag(u) Q^T``, or ``U Q^T`` with U kept x r."""
    norm: Literal["global", "per_matrix"] = "global"
    """Over what |G_pert| is taken: all matrices, or each."""
    moment_on_refresh: Literal["rotate", "keep", "reset"] = "rotate"
    accumulation: Literal["per_step", "per_micro_batch"] = "per_step"
    """Whether the micro-batches of a step share one perturbation, or each has its own."""
    orthogonal_component: bool = Field(False, strict=True)
    """Lorenza+: what the subspace leaves out of the gradient is added to the update."""
    orthogonal_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["norm_ratio"] = 1.0
    """s; ``norm_ratio`` takes ``|N_i| / |R_i|`` for each kept row i."""

    @model_validator(mode="before")
    @classmethod
    def _without_a_rank(cls, given: Any) -> Any:
        if isinstance(given, dict) and "rank" in given and given["rank"] is None:
            return {"probe_form": "gaussian", **given}
        return given

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.rank is None and self.probe_form == "diagonal":
            raise ValueError("probe_form 'diagonal' needs a rank: set rank, or probe_form to 'gaussian'")
        if self.rank is None and self.orthogonal_component:
            raise ValueError("orthogonal_component needs a rank: without one nothing is left out of the gradient")
        if self.orthogonal_scale != 1.0 and not self.orthogonal_component:
            raise ValueError("orthogonal_scale belongs to orthogonal_component: remove it, or set that to true")

    @property
    def ascent(self) -> Ascent | None:
        if self.perturbation_radius == 0:
            return None
        per_matrix, per_micro_batch = self.norm == "per_matrix", self.accumulation == "per_micro_batch"
        return Ascent(
            self.probes, self.probe_radius, self.perturbation_radius, self.two_sided, per_matrix, per_micro_batch
        )


class Lorenza(Method):
    """LORENZA on one matrix."""

    name: ClassVar[str] = "Lorenza"
    Options: ClassVar[type[LorenzaOptions]] = LorenzaOptions

    @staticmethod
    def rank(shape: tuple[int, int], options: LorenzaOptions) -> int:
        return min(shape) if options.rank is None else min(options.rank, *shape)

    @classmethod
    def rank_text(cls, shape: tuple[int, int], options: LorenzaOptions) -> str:
        return "full" if options.rank is None else super().rank_text(shape, options)

    @staticmethod
    def state(shard: MatrixShard, options: LorenzaOptions, rank: int) -> StateSpec:
        if options.rank is None:
            return full_rank_state(shard, options)
        layout: dict[str, TensorSpec | int] = {
            "basis": TensorSpec(shard.compressed, rank),
            **Adam(options).state(shard, shard.kept, rank),
            "age": 0,
        }
        if options.probe_form == "diagonal":
            layout["right_factor"] = TensorSpec(shard.kept, rank)
        return layout

    @staticmethod
    def directions(
        shard: MatrixShard, state: State, options: LorenzaOptions, target: MatrixShard
    ) -> Program[Directions]:
        if options.rank is None:
            return FullSpace(target, options.seed)

        def ask(axis: Axis, owned: torch.Tensor) -> Request:
            return axis.all_gather(owned) if target is shard else axis.all_gather_full(owned)

        def pick(axis: Axis, rows: torch.Tensor) -> torch.Tensor:
            return rows if target is shard else rows[slice(*axis.held)]

        lengths = state["basis"].square().sum(0, keepdim=True)
        if options.probe_form == "gaussian":
            basis, squares = yield ask(shard.compressed, state["basis"]), shard.all_reduce(lengths)
            return GaussianInSubspace(target, options.seed, pick(target.compressed, basis), squares.squeeze(0))
        lengths = torch.cat([lengths, state["right_factor"].square().sum(0, keepdim=True)])
        basis, factor, squares = yield (
            ask(shard.compressed, state["basis"]),
            ask(shard.kept, state["right_factor"]),
            shard.all_reduce(lengths),
        )
        basis, factor = pick(target.compressed, basis), pick(target.kept, factor)
        return Diagonal(target, options.seed, basis, factor, squares.prod(0))

    @staticmethod
    def project(shard: MatrixShard, state: State, options: LorenzaOptions, step: int) -> Program[ProjectedGradient]:
        if options.rank is None:
            return ProjectedGradient(shard.flat_gradient, refreshed=False)
        due = step % options.update_proj_gap == 0
        own = state["basis"]
        if due:
            own = yield from randomized_range(shard, Lorenza.rank(shard.shape, options), options.seed, step)
        return (yield from project_on(shard, own, refreshed=due))

    @staticmethod
    def update(
        shard: MatrixShard, state: State, options: LorenzaOptions, step: int, found: ProjectedGradient
    ) -> Program[Update]:
        if not isinstance(found, Projection):
            return (yield from full_rank_adam(shard, state, options, step, shard.flat_gradient.float))
        basis = found.basis
        if found.is_zero:
            # No subspace can be read off it: the old one stays until the next refresh.
            found.refreshed = False
            basis = yield shard.compressed.all_gather(state["basis"])
        elif found.refreshed:
            yield from change_subspace(shard, state, options, found, first=step == 0)
        state["age"] += 1
        direction = yield from Adam(options).direction(shard, shard.kept, state, found.projected, state["age"])
        if options.orthogonal_component:
            return (yield from add_orthogonal_component(shard, options, found, direction, basis))
        return Factors((yield shard.kept.all_gather(direction)), basis, options.scale)


def change_subspace(
    shard: MatrixShard, state: State, options: LorenzaOptions, found: Projection, first: bool
) -> Program[None]:
    """Store a new basis and its right factor; carry the moments over, or forget them."""
    if options.moment_on_refresh == "reset":
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
        state["age"] = 0
    if options.moment_on_refresh == "rotate" and not first:
        Adam(options).rotate(state, (yield from shard.replicated_sum(state["basis"].T @ found.own)))
    state["basis"].copy_(found.own)
    if options.probe_form == "diagonal":
        tall = yield shard.kept.gather_to_root(found.projected)
        state["right_factor"].copy_((yield shard.kept.scatter_from_root(orthonormal(tall))))


def add_orthogonal_component(
    shard: MatrixShard, options: LorenzaOptions, found: Projection, direction: torch.Tensor, basis: torch.Tensor
) -> Program[Update]:
    """Lorenza+: ``scale N Q^T + s (H - R Q^T)``.

    Args:
        direction: ``N``, owned kept rows x r.
    """
    unit = found.safe_scale if options.orthogonal_scale == "norm_ratio" else 1.0
    projected = found.projected / unit
    if options.orthogonal_scale == "norm_ratio":
        share = ratio(torch.linalg.vector_norm(direction, dim=1), torch.linalg.vector_norm(projected, dim=1))
    else:
        share = torch.full_like(projected[:, 0], options.orthogonal_scale)
    share = share.unsqueeze(1)
    held = yield shard.kept.all_gather(torch.cat([options.scale * direction - share * projected, share], dim=1))
    inside, share = held[:, :-1], held[:, -1:]

    def update() -> torch.Tensor:
        flat = shard.lifted(Factors(inside, basis, 1.0))
        for rectangle, piece, gradient in zip(shard.part.rectangles, shard.views(flat), shard.gradient, strict=True):
            piece.addcmul_(gradient.float() / unit, shard.kept_of(rectangle, share))
        return flat

    return Dense(update, 1.0)
