"""What methods with a stored basis share: options, projecting onto the basis, descending in its subspace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.moments import rotate_first
from ds_lowrank.methods.blocks.basis_options import BasisOptions
from ds_lowrank.methods.blocks.dct_basis import columns_at, gather_columns, indices_spec, strongest_columns
from ds_lowrank.methods.blocks.inner_optimizers import InnerOptimizer, InnerOptimizerName, Lion, make_inner_optimizer
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.sharding.elementwise import squared_norms
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Factors


class SubspaceOptions(BasisOptions):
    """The keys that GaLore, GradNormLoRP and Online Subspace Descent share."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*BasisOptions.fixed_on_resume, "rank", "inner")

    rank: int = Field(128, gt=0, strict=True)
    """Columns of the basis, r; at most the smaller dimension of a matrix."""
    scale: float = Field(0.25, ge=0, allow_inf_nan=False)
    """The paper's alpha: multiplies the update of a projected matrix, not its weight decay."""
    inner: InnerOptimizerName = "adamw"
    """rho: what turns the projected gradient into a direction."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """The momentum of ``inner`` ``sgd``."""
    lion_sign: Literal["subspace", "original"] = "subspace"
    """Where ``inner`` ``lion`` takes its sign: before the lift (the paper), or after it (the official code)."""

    def model_post_init(self, context: Any) -> None:
        """Refuse options that belong to another inner optimizer than the chosen one.

        Raises:
            ValueError: ``momentum`` without ``sgd``, or an ``original`` ``lion_sign`` without ``lion``.
        """
        super().model_post_init(context)
        if self.momentum and self.inner != "sgd":
            raise ValueError(f"momentum belongs to inner 'sgd', inner is {self.inner!r}: remove one of them")
        if self.lion_sign == "original" and self.inner != "lion":
            raise ValueError(f"lion_sign belongs to inner 'lion', inner is {self.inner!r}: remove one of them")

    @property
    def inner_optimizer(self) -> InnerOptimizer:
        """The optimizer named by ``inner``."""
        return make_inner_optimizer(self.inner, self, momentum=self.momentum)


@dataclass
class Projection(ProjectedGradient):
    """A projection onto a basis: ``projected`` is ``R = H Q``, matrices x owned kept rows x rank.

    Attributes:
        own: what this rank stores of the basis: the rows that it owns, matrices x owned compressed rows x rank, or of
            the indices of columns, matrices x owned rows x 1; fp32.
        basis: the rows of the basis that this rank computes with: matrices x held compressed rows x rank, fp32.
        is_drawn: whether the basis, if it is new, is random.
    """

    own: torch.Tensor = field(kw_only=True)
    basis: torch.Tensor = field(kw_only=True)
    is_drawn: bool = field(default=False, kw_only=True)

    @property
    def refreshed(self) -> bool:
        """Whether this step uses a new basis. In a gradient of zeros none can be found: the old one stays."""
        return self.due and (self.is_drawn or not self.is_zero)

    def energies(self, shard: MatrixShard, options: Any) -> torch.Tensor | None:
        """``|H Q|^2`` and ``|H|^2`` of this rank's elements, over the squares of the safe scales: matrices x 2, fp32.

        None where every rank has a gradient of its own (the square of a sum is not the sum of squares), or backward has
        dropped it.
        """
        if shard.geometry.copies > 1 or shard.is_accumulated:
            return None
        captured = (self.projected / self.safe_scale).square().sum((1, 2))
        return torch.stack([captured, self.gradient_squares(shard, options).sum((1, 2))], dim=1)

    def gradient_squares(self, shard: MatrixShard, options: Any) -> torch.Tensor:
        """Squared norms of the kept rows of what was projected, over the squares of the safe scales.

        Args:
            shard: with the gradients.
            options: of the matrices' group.

        Returns:
            This rank's contributions: matrices x held kept rows x 1, fp32.
        """
        return squared_norms(shard, shard.kept, shard.gradient, self.safe_scale, self.are_ordinary)


def subspace_state(shard: MatrixShard, options: SubspaceOptions, rank: int) -> StateSpec:
    """The state of a basis and its inner optimizer.

    Args:
        shard: the stack.
        options: with the inner optimizer.
        rank: columns of the basis.

    Returns:
        ``basis``, compressed x rank, or ``indices``, rank x 1, and the inner optimizer's tensors for kept x rank.
    """
    inner = options.inner_optimizer.state(shard, shard.kept, rank)
    if options.stores_indices:
        return {"indices": indices_spec(shard, rank), **inner}
    return {"basis": options.basis_spec(shard, rank), **inner}


BasisPlacement = Literal["partitioned", "replicated"]
"""Whether a rank keeps the rows of a basis that it owns, or between refreshes all that it computes with. The first
takes less memory, the second sends less: no basis is gathered in an ordinary step."""


def project_on(shard: MatrixShard, own: torch.Tensor, due: bool, options: Options) -> Program[Projection]:
    """Project the gradient onto a basis: ``R = H Q``.

    Args:
        shard: the stack, with this step's gradient attached.
        own: what this rank stores of ``Q``, as :class:`Projection` has it.
        due: whether it is a new basis.
        options: with ``basis_placement``, where the method has it.
    """
    if shard.held_basis is None or (due and not shard.is_accumulated):
        basis = yield from gather_basis(shard, own, options)
    else:
        basis = shard.held_basis
    if options.keeps_bases_gathered and not due:
        shard.held_basis = basis
    projected = yield shard.kept.reduce_scatter(shard.times(basis))  # R = H Q
    return Projection(projected, due, own=own, basis=basis)


def project_on_columns(shard: MatrixShard, rank: int) -> Program[Projection]:
    """Project the gradient onto the columns of the DCT-II matrix in which it has most of its energy.

    Args:
        shard: the stack, with this step's gradient attached.
        rank: how many columns.
    """
    indices, projected = yield from strongest_columns(shard, rank)
    own = shard.replicated_axis(rank).own(indices.float().unsqueeze(2))
    return Projection(projected, True, own=own, basis=columns_at(shard, indices))


def gather_basis(shard: MatrixShard, own: torch.Tensor, options: Any) -> Program[torch.Tensor]:
    """The basis that this rank computes with: matrices x held compressed rows x rank, fp32.

    Args:
        shard: the stack.
        own: what this rank stores of it, as :class:`Projection` has it.
        options: of the matrices' group.
    """
    if options.stores_indices:
        return (yield from gather_columns(shard, own, min(options.rank, *shard.shape)))
    basis: torch.Tensor = yield shard.compressed.all_gather(own)
    return basis


def stored_basis(state: State) -> torch.Tensor:
    """What a rank stores of a basis, as :class:`Projection` has it."""
    stored: torch.Tensor = state["indices"] if "indices" in state else state["basis"]
    return stored


def basis_factors(shard: MatrixShard, state: State, options: Options) -> Program[Sums]:
    """The basis that the next gradients are projected onto: matrices x held compressed rows x rank, fp32.

    Args:
        shard: the stack.
        state: with the stored basis.
        options: of the matrices' group.
    """
    if shard.held_basis is None:
        shard.held_basis = yield from gather_basis(shard, stored_basis(state), options)
    return (shard.held_basis,)


def basis_of_step(shard: MatrixShard, state: State, options: Options, found: Projection) -> Program[torch.Tensor]:
    """The basis of the subspace that this step descends in.

    It is the one that the gradient was projected onto or, for a gradient of zeros, the stored one.

    Args:
        shard: the stack.
        state: with the stored basis.
        options: with ``basis_placement``, where the method has it.
        found: the projection of this step's gradient.

    Returns:
        matrices x held compressed rows x rank, fp32.
    """
    if found.due and not found.refreshed:
        return (yield from gather_basis(shard, stored_basis(state), options))
    keep_gathered(shard, options, found.basis, found.due)
    return found.basis


def take_basis(shard: MatrixShard, state: State, new: torch.Tensor, momentum: torch.Tensor) -> Program[None]:
    """Store a new basis, and carry a momentum into it: ``M <- M Q_old^T Q``.

    Args:
        shard: the stack.
        state: with the old basis, none before the first step.
        new: ``Q``: matrices x owned compressed rows x rank, fp32.
        momentum: ``M``: matrices x owned kept rows x rank, fp32, changed in place.
    """
    if state["step"] > 0:
        rotate_first(momentum, (yield from shard.replicated_sum(state["basis"].mT @ new)))  # Q_old^T Q
    state["basis"] = new


def keep_gathered(shard: MatrixShard, options: Options, basis: torch.Tensor, is_new: bool) -> None:
    """Keep what was gathered of a basis for the next step, if the options say so and that step has the same one.

    Args:
        shard: the stack.
        options: with ``basis_placement``, where the method has it, and ``basis_dtype``.
        basis: matrices x held compressed rows x rank, fp32.
        is_new: whether it is not stored yet: rounding will make another one of it.
    """
    if options.keeps_bases_gathered:
        is_exact = not isinstance(options, BasisOptions) or options.basis_dtype == "fp32"
        shard.held_basis = None if is_new and not is_exact else basis


def descend(
    shard: MatrixShard, state: State, options: SubspaceOptions, projected: torch.Tensor, basis: torch.Tensor
) -> Program[Factors | Dense]:
    """The update ``scale * N Q^T`` with ``N = rho(R)``.

    Args:
        shard: the stack.
        state: with the moments of the inner optimizer, which are updated, and ``step``.
        options: with the inner optimizer.
        projected: ``R``, matrices x owned kept rows x rank, fp32.
        basis: ``Q``, matrices x held compressed rows x rank, fp32.
    """
    inner = options.inner_optimizer
    if isinstance(inner, Lion) and options.lion_sign == "original":
        mixed = yield shard.kept.all_gather(inner.interpolated(state, projected))
        factors = Factors(mixed, basis, options.scale)
        return Dense(lambda piece: factors.lifted(shard, piece).sign_(), options.scale)
    direction = yield from inner.direction(shard, shard.kept, state, projected, state["step"] + 1)  # N = rho(R)
    direction = yield shard.kept.all_gather(direction)
    return Factors(direction, basis, options.scale)
