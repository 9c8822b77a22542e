"""What methods with a stored basis share: options, projecting onto the basis, descending in its subspace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.methods.blocks.basis_options import BasisOptions
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
        own: the rows of the basis that this rank owns: matrices x owned compressed rows x rank, fp32.
        basis: the rows of the basis that this rank computes with: matrices x held compressed rows x rank, fp32.
    """

    own: torch.Tensor = field(kw_only=True)
    basis: torch.Tensor = field(kw_only=True)

    @property
    def refreshed(self) -> bool:
        """Whether this step uses a new basis. A gradient of zeros has no leading subspace: the old basis stays."""
        return self.due and not self.is_zero

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
        ``basis``, compressed x rank, and the inner optimizer's tensors for kept x rank.
    """
    return {"basis": options.basis_spec(shard, rank), **options.inner_optimizer.state(shard, shard.kept, rank)}


BasisPlacement = Literal["partitioned", "replicated"]
"""Whether a rank keeps the rows of a basis that it owns, or between refreshes all that it computes with. The first
takes less memory, the second sends less: no basis is gathered in an ordinary step."""


def project_on(shard: MatrixShard, own: torch.Tensor, due: bool, options: Options) -> Program[Projection]:
    """Project the gradient onto a basis: ``R = H Q``.

    Args:
        shard: the stack, with this step's gradient attached.
        own: this rank's rows of ``Q``: matrices x owned compressed rows x rank, fp32.
        due: whether it is a new basis.
        options: with ``basis_placement``, where the method has it.
    """
    if shard.held_basis is None or (due and not shard.is_accumulated):
        basis = yield shard.compressed.all_gather(own)
    else:
        basis = shard.held_basis
    if options.keeps_bases_gathered and not due:
        shard.held_basis = basis
    projected = yield shard.kept.reduce_scatter(shard.times(basis))  # R = H Q
    return Projection(projected, due, own=own, basis=basis)


def basis_factors(shard: MatrixShard, state: State) -> Program[Sums]:
    """The basis that the next gradients are projected onto: matrices x held compressed rows x rank, fp32.

    Args:
        shard: the stack.
        state: with the stored basis.
    """
    if shard.held_basis is None:
        shard.held_basis = yield shard.compressed.all_gather(state["basis"])
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
    if found.is_zero and found.due:
        stored: torch.Tensor = yield shard.compressed.all_gather(state["basis"])
        return stored
    keep_gathered(shard, options, found.basis, found.due)
    return found.basis


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
