"""LORENZA and AdaZo-SAM (Refael et al., arXiv 2502.19571): a projected step on the gradient where the loss is higher.

A few forward passes estimate in which direction of the subspace the loss rises, the one backward pass is taken a step
in that direction away, and Adam applies its gradient to the weights themselves. With the compressed dimension second,
``Q`` compressed x r and ``F`` kept x r (the paper's R_t, transposed):

    Pi_j   = F diag(u_j) Q^T                                 u_j ~ N(0, I_r), j = 1..q, for all matrices at once
    c_j    = (f(W + mu Pi_j) - f(W - mu Pi_j)) / (2 mu)
    G_pert = 1/q sum_j c_j Pi_j
    H      = grad f(W + rho G_pert / |G_pert|)
    every T steps    Q <- range of H,  F <- range of H Q,  or both in singular pairs: H Q = F S
    R <- H Q;  N <- Adam(R)
    W <- W - lr * scale * N Q^T                              Lorenza+ adds s (H - R Q^T)

The ascent (c_j, G_pert) is :mod:`ds_lowrank.methods.blocks.ascent`, the same for every matrix; the directions Pi_j and
the step of one matrix are here. Without a rank the directions are ``Pi_j ~ N(0, 1)`` and Adam is of full size: that is
AdaZo-SAM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ds_lowrank.linalg.energy import singular_pairs
from ds_lowrank.linalg.orthonormal import orthonormal
from ds_lowrank.methods.base import PerturbingMethod
from ds_lowrank.methods.blocks.ascent import Ascent
from ds_lowrank.methods.blocks.directions import Diagonal, Directions, FullSpace, GaussianInSubspace
from ds_lowrank.methods.blocks.full_rank_adam import full_rank_adam, full_rank_state
from ds_lowrank.methods.blocks.inner_optimizers import Adam
from ds_lowrank.methods.blocks.projection import ProjectedGradient, safe_ratio
from ds_lowrank.methods.blocks.range_finder import RangeFinderOptions, randomized_range
from ds_lowrank.methods.blocks.rest import with_rest
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.subspace import BasisPlacement, Projection, basis_factors, basis_of_step, project_on
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.elementwise import largest_magnitudes
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program, Request
from ds_lowrank.sharding.updates import Factors, Update


class LorenzaOptions(RangeFinderOptions):
    """The keys of LORENZA, with the paper's symbols."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*RangeFinderOptions.fixed_on_resume, "rank", "probe_form")

    rank: Annotated[int, Field(gt=0, strict=True)] | None = 128
    """Columns of ``Q``, r. None: AdaZo-SAM, on whole gradients."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """T, in optimizer steps."""
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the update of a projected matrix, not its weight decay."""
    probes: int = Field(1, ge=1, strict=True)
    """q, random directions per step."""
    probe_radius: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """mu, how far each probe goes."""
    perturbation_radius: float = Field(0.05, ge=0, allow_inf_nan=False)
    """rho, how far from the weights the gradient is taken; 0 takes it at the weights and probes nothing."""
    two_sided: bool = Field(True, strict=True)
    """Whether a probe looks at both sides of the weights, or compares one side with the weights."""
    probe_form: Literal["diagonal", "gaussian"] = "diagonal"
    """``F diag(u) Q^T``, or ``U Q^T`` with U kept x r."""
    right_factor: Literal["qr", "svd"] = "qr"
    """What F is: the orthogonal factor of ``H Q``, or its left singular vectors with Q turned to the right ones."""
    norm: Literal["global", "per_matrix"] = "global"
    """Over what |G_pert| is taken: all matrices, or each."""
    moment_on_refresh: Literal["rotate", "keep", "reset"] = "rotate"
    """What a refresh does to the moments."""
    accumulation: Literal["per_step", "per_micro_batch"] = "per_step"
    """Whether the micro-batches of a step share one perturbation, or each has its own."""
    basis_placement: BasisPlacement = "partitioned"
    """Whether a rank stores the rows of a basis that it owns, or keeps all that it computes with between refreshes."""
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
        """Refuse options that need a rank without one, and a scale without what it scales."""
        super().model_post_init(context)
        if self.rank is None and self.probe_form == "diagonal":
            raise ValueError("probe_form 'diagonal' needs a rank: set rank, or probe_form to 'gaussian'")
        if self.right_factor == "svd" and self.probe_form != "diagonal":
            raise ValueError("right_factor belongs to probe_form 'diagonal': remove it, or set that and a rank")
        if self.rank is None and self.orthogonal_component:
            raise ValueError("orthogonal_component needs a rank: without one nothing is left out of the gradient")
        if self.rank is None and self.power_steps != 1:
            raise ValueError("power_steps needs a rank: without one no basis is found")
        if self.orthogonal_scale != 1.0 and not self.orthogonal_component:
            raise ValueError("orthogonal_scale belongs to orthogonal_component: remove it, or set that to true")

    @property
    def ascent(self) -> Ascent | None:
        """q, mu and rho; None if the gradient is taken at the weights."""
        if self.perturbation_radius == 0:
            return None
        return Ascent(
            probes=self.probes,
            probe_radius=self.probe_radius,
            radius=self.perturbation_radius,
            two_sided=self.two_sided,
            per_matrix=self.norm == "per_matrix",
            per_micro_batch=self.accumulation == "per_micro_batch",
        )


@dataclass
class PairedProjection(Projection):
    """A projection on a new basis of right singular vectors of what was projected.

    Attributes:
        right_factor: this rank's rows of the left ones, F: matrices x owned kept rows x rank, fp32.
    """

    right_factor: Tensor = field(kw_only=True)


class LorenzaMethod(PerturbingMethod):
    """LORENZA on the matrices of a stack."""

    name: ClassVar[str] = "Lorenza"
    Options: ClassVar[type[LorenzaOptions]] = LorenzaOptions

    @staticmethod
    def rank(shape: tuple[int, int], options: LorenzaOptions) -> int:
        """The rank, or the smaller dimension without one."""
        return min(shape) if options.rank is None else min(options.rank, *shape)

    @classmethod
    def rank_text(cls, shape: tuple[int, int], options: LorenzaOptions) -> str:
        """The rank as the role table shows it."""
        return "full" if options.rank is None else super().rank_text(shape, options)

    @staticmethod
    def state(shard: MatrixShard, options: LorenzaOptions, rank: int) -> StateSpec:
        """``Q`` compressed x r, Adam's moments kept x r, and for ``diagonal`` probes ``F`` kept x r."""
        if options.rank is None:
            return full_rank_state(shard, options)
        spec: dict[str, TensorSpec | int] = {
            "basis": options.basis_spec(shard, rank),
            **Adam(options).state(shard, shard.kept, rank),
            "age": 0,
        }
        if options.probe_form == "diagonal":
            spec["right_factor"] = TensorSpec(shard.kept, rank)
        return spec

    @staticmethod
    def directions(
        shard: MatrixShard, state: State, options: LorenzaOptions, target: MatrixShard
    ) -> Program[Directions]:
        """``Pi = F diag(u) Q^T``, ``U Q^T`` or, without a rank, a matrix of normal numbers."""
        if options.rank is None:
            return FullSpace(target, options.seed)
        lengths = state["basis"].square().sum(1, keepdim=True)
        if options.probe_form == "gaussian":
            basis, squares = yield for_target(shard, target, "compressed", state["basis"]), shard.all_reduce(lengths)
            basis = rows_of_target(shard, target, "compressed", basis)
            return GaussianInSubspace(target, options.seed, basis, squares.squeeze(1))
        lengths = torch.cat([lengths, state["right_factor"].square().sum(1, keepdim=True)], dim=1)
        basis, factor, squares = yield (
            for_target(shard, target, "compressed", state["basis"]),
            for_target(shard, target, "kept", state["right_factor"]),
            shard.all_reduce(lengths),
        )
        basis = rows_of_target(shard, target, "compressed", basis)
        factor = rows_of_target(shard, target, "kept", factor)
        return Diagonal(target, options.seed, basis, factor, squares.prod(1))

    @staticmethod
    def needs_gradient(options: LorenzaOptions) -> str | None:
        """An ordinary step needs ``R = H Q`` only, unless it is of full size or adds what the subspace leaves out."""
        if options.rank is None:
            return "AdaZo-SAM steps on whole gradients: set a rank, or reduction to 'gradient'"
        if options.orthogonal_component:
            return "Lorenza+ adds what the subspace leaves out of the whole gradient: set reduction to 'gradient'"
        return None

    @staticmethod
    def factors(shard: MatrixShard, state: State, options: LorenzaOptions) -> Program[Sums | None]:
        """``Q``; None if a new one is due, which is found in the gradient."""
        return None if subspace_due(state, options) else (yield from basis_factors(shard, state, options))

    @staticmethod
    def project(shard: MatrixShard, state: State, options: LorenzaOptions) -> Program[ProjectedGradient]:
        """Find ``Q`` if it is due, and project: ``R = H Q``. Without a rank the gradient itself is what is found."""
        if options.rank is None:
            return ProjectedGradient(largest_magnitudes(shard), due=False)
        due = subspace_due(state, options)
        own = state["basis"]
        if due:
            rank = LorenzaMethod.rank(shard.shape, options)
            own = yield from randomized_range(shard, rank, options.seed, state["step"], options.power_steps)
        found = yield from project_on(shard, own, due, options)  # R = H Q
        return (yield from in_pairs(shard, found)) if due and options.right_factor == "svd" else found

    @staticmethod
    def update(shard: MatrixShard, state: State, options: LorenzaOptions, found: ProjectedGradient) -> Program[Update]:
        """``N <- Adam(R)``, and the update ``scale * N Q^T``."""
        if not isinstance(found, Projection):
            return (yield from full_rank_adam(shard, state, options, shard.gradient.values_at))
        basis = yield from basis_of_step(shard, state, options, found)
        if found.refreshed:
            yield from change_subspace(shard, state, options, found)
        state["age"] += 1
        direction = yield from Adam(options).direction(shard, shard.kept, state, found.projected, state["age"])
        if options.orthogonal_component:
            return (yield from add_orthogonal_component(shard, options, found, direction, basis))
        return Factors((yield shard.kept.all_gather(direction)), basis, options.scale)  # scale * N Q^T


def subspace_due(state: State, options: LorenzaOptions) -> bool:
    """Whether a new subspace is due: in steps 0, T, 2T, ..."""
    due: bool = state["step"] % options.update_proj_gap == 0
    return due


def in_pairs(shard: MatrixShard, found: Projection) -> Program[PairedProjection]:
    """Turn Q so that ``R = H Q = F S``: the columns of F and Q are then pairs of singular vectors of R.

    Args:
        shard: the stack.
        found: the projection on a new basis.
    """
    tall = yield shard.kept.gather_to_root(found.projected)
    factor, turn = singular_pairs(tall)
    factor, turn = yield (
        shard.kept.scatter_from_root(factor),
        shard.replicated_axis(tall.shape[2]).broadcast_from_root(turn),
    )
    turn = shard.or_zeros(turn, tall.shape[2])
    own, basis = found.own @ turn, found.basis @ turn
    return PairedProjection(found.projected @ turn, found.due, own=own, basis=basis, right_factor=factor)


def for_target(shard: MatrixShard, target: MatrixShard, axis: Literal["kept", "compressed"], own: Tensor) -> Request:
    """Ask for a factor's rows that moving ``target`` needs: the held ones, or all if more than this shard is moved.

    Args:
        shard: what this rank's optimizer holds of the matrix.
        target: what is to be moved.
        axis: the axis along which the factor's rows are dealt.
        own: this rank's rows of the factor: owned rows x r, fp32.
    """
    source: Axis = getattr(shard, axis)
    return source.all_gather(own) if target is shard else source.all_gather_full(own)


def rows_of_target(
    shard: MatrixShard, target: MatrixShard, axis: Literal["kept", "compressed"], rows: Tensor
) -> Tensor:
    """Those of the rows that :func:`for_target` brought which ``target`` holds: held rows x r, fp32."""
    held: tuple[int, int] = getattr(target, axis).held
    return rows if target is shard else rows[:, slice(*held)]


def change_subspace(shard: MatrixShard, state: State, options: LorenzaOptions, found: Projection) -> Program[None]:
    """Store a new basis ``Q`` and its right factor ``F``; rotate the moments, keep them, or reset them."""
    if options.moment_on_refresh == "reset":
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
        state["age"] = 0
    if options.moment_on_refresh == "rotate" and state["step"] > 0:
        rotation = yield from shard.replicated_sum(state["basis"].mT @ found.own)  # Q_old^T Q
        Adam(options).rotate(state, rotation)
    state["basis"] = found.own
    if isinstance(found, PairedProjection):
        state["right_factor"].copy_(found.right_factor)
    elif options.probe_form == "diagonal":
        tall = yield shard.kept.gather_to_root(found.projected)
        state["right_factor"].copy_((yield shard.kept.scatter_from_root(orthonormal(tall))))  # F = range of H Q


def add_orthogonal_component(
    shard: MatrixShard, options: LorenzaOptions, found: Projection, direction: Tensor, basis: Tensor
) -> Program[Update]:
    """Lorenza+: ``scale N Q^T + s (H - R Q^T)``, as one product ``(scale N - s R) Q^T`` and ``s H``.

    Args:
        shard: the stack, with this step's gradient.
        options: with ``scale`` and ``orthogonal_scale``, s.
        found: with ``R``, owned kept rows x r.
        direction: ``N``, owned kept rows x r, fp32.
        basis: ``Q``, held compressed rows x r, fp32.
    """
    projected = found.projected
    if options.orthogonal_scale == "norm_ratio":
        lengths = torch.linalg.vector_norm(projected / found.safe_scale, dim=2, keepdim=True)
        s = safe_ratio(torch.linalg.vector_norm(direction, dim=2, keepdim=True), lengths) / found.safe_scale
    else:
        s = torch.full_like(projected[..., :1], options.orthogonal_scale)
    return (yield from with_rest(shard, options.scale * direction, projected, basis, s, 1.0))
