"""Online Subspace Descent (Liang et al., arXiv 2408.12857, Algorithm 1): the basis moves a little in every step.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x rank; ``eps_P = alpha lr``:

    R <- H Q
    W <- W - lr * scale * rho(R) Q^T - lr * wd * W
    Q <- Q - eps_P * (rho_P(grad L(Q)) + wd_P * Q)        with the Q that was used for W

    L(Q) = |H~ Q Q^T - H~|^2 + lambda |Q^T Q - I|^2,  H~ = H / |H|        (Equation 6)

With ``pca_norm`` ``projected`` it is ``H~ = H / |H Q|``, which is known where only projections of gradients are summed.
With ``basis_optimizer`` ``random`` there is no loss: every T steps ``Q`` is another random orthonormal basis.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field

from ds_lowrank.linalg.sketch import normal
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.inner_optimizers import InnerOptimizer, make_inner_optimizer, own_rule
from ds_lowrank.methods.blocks.projection import safe_ratio
from ds_lowrank.methods.blocks.range_finder import leading_basis, random_basis
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import (
    Projection,
    SubspaceOptions,
    basis_factors,
    descend,
    keep_gathered,
    project_on,
    subspace_state,
)
from ds_lowrank.sharding.elementwise import squared_norms
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program, concurrently
from ds_lowrank.sharding.updates import Update

BASIS_OPTIMIZERS = ("adam", "sgd", "lion", "adafactor", "random")
PCA_KEYS = ("pca_lambda", "pca_norm", "basis_lr_ratio", "basis_betas", "basis_init", "basis_weight_decay")


def check_basis_optimizer(name: Any) -> str:
    """A rule by its name, or a class of the user's as ``package.module:Class``, which is imported.

    Raises:
        ValueError: there is no such rule.
    """
    if not isinstance(name, str) or (name not in BASIS_OPTIMIZERS and ":" not in name):
        raise ValueError("should be 'adam', 'sgd', 'lion', 'adafactor', 'random' or 'package.module:Class'")
    if name not in BASIS_OPTIMIZERS:
        own_rule(name)
    return name


class OnlineSubspaceDescentOptions(SubspaceOptions):
    """The keys of Online Subspace Descent."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*SubspaceOptions.fixed_on_resume, "basis_optimizer")

    pca_lambda: float = Field(0.1, ge=0, allow_inf_nan=False)
    """lambda: the weight of the term that keeps the basis near orthonormal."""
    basis_lr_ratio: float = Field(5.0, ge=0, allow_inf_nan=False)
    """alpha: the basis moves at ``alpha * lr``."""
    basis_optimizer: Annotated[str, BeforeValidator(check_basis_optimizer)] = "adam"
    """rho_P: what turns the gradient of the PCA loss into a direction. ``random``: none, the basis is drawn anew."""
    basis_betas: tuple[float, float] | None = None
    """The betas of ``basis_optimizer``. None: ``betas``."""
    update_proj_gap: int = Field(200, gt=0, strict=True)
    """With ``random``: how many optimizer steps a basis lasts."""
    basis_init: Literal["svd", "randomized", "random"] = "randomized"
    """The first basis: of the first gradient, or a random orthonormal one."""
    pca_norm: Literal["gradient", "projected"] = "gradient"
    """What the gradient is divided by in the PCA loss: its norm, or that of its projection ``H Q``."""
    basis_weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False)
    """The decoupled weight decay of the basis. None: ``weight_decay``, as in Algorithm 1."""

    def model_post_init(self, context: Any) -> None:
        """Refuse options of another way to move the basis, and so few bits that its small steps would be lost."""
        super().model_post_init(context)
        chosen, fields = self.basis_optimizer, type(self).model_fields
        for key in PCA_KEYS if self.is_random else ("update_proj_gap",):
            if getattr(self, key) != fields[key].default:
                owner = "a basis that descends on the PCA loss" if self.is_random else "basis_optimizer 'random'"
                raise ValueError(f"{key} belongs to {owner}, basis_optimizer is {chosen!r}: remove one of them")
        if self.basis_betas is not None and chosen in ("sgd", "adafactor"):
            raise ValueError(f"basis_betas: basis_optimizer {chosen!r} has none: remove one of them")
        if self.basis_dtype == "int4" and not self.is_random:
            raise ValueError(
                "basis_dtype 'int4' loses the small steps that the basis takes: set it to 'bf16' or 'fp32'"
            )
        if not all(0 <= beta < 1 for beta in self.basis_betas or ()):
            raise ValueError(f"basis_betas must lie in [0, 1), got {self.basis_betas}")

    @property
    def is_random(self) -> bool:
        """Whether bases are drawn, and do not depend on gradients."""
        return self.basis_optimizer == "random"

    def basis_due(self, step: int) -> bool:
        """Whether the basis of this step is not the one that the last step has left."""
        return step == 0 or (self.is_random and step % self.update_proj_gap == 0)

    @property
    def basis_inner_optimizer(self) -> InnerOptimizer:
        """The optimizer of the basis, rho_P."""
        own = self if self.basis_betas is None else self.model_copy(update={"betas": self.basis_betas})
        return make_inner_optimizer(self.basis_optimizer, own, prefix="basis_")


class OnlineSubspaceDescentMethod(Method):
    """Online Subspace Descent on the matrices of a stack."""

    name: ClassVar[str] = "OnlineSubspaceDescent"
    Options: ClassVar[type[OnlineSubspaceDescentOptions]] = OnlineSubspaceDescentOptions

    @staticmethod
    def state(shard: MatrixShard, options: OnlineSubspaceDescentOptions, rank: int) -> StateSpec:
        """``Q`` compressed x rank with the moments of its own optimizer, and rho's moments, kept x rank."""
        if options.is_random:
            return subspace_state(shard, options, rank)
        return {
            **subspace_state(shard, options, rank),
            **options.basis_inner_optimizer.state(shard, shard.compressed, rank),
            "basis_steps": 0,
        }

    @staticmethod
    def needs_gradient(options: OnlineSubspaceDescentOptions) -> str | None:
        """A step needs ``|H|``, unless ``pca_norm`` is ``projected`` or the basis ``random``."""
        if options.pca_norm == "gradient" and not options.is_random:
            return (
                "its loss divides by the norm of the summed gradient, which nobody has: set pca_norm to 'projected', "
                "or reduction to 'gradient'"
            )
        return None

    @staticmethod
    def factors(shard: MatrixShard, state: State, options: OnlineSubspaceDescentOptions) -> Program[Sums | None]:
        """``Q`` if it is random. Else None: a step multiplies the gradient also by ``R``, once all have summed that."""
        if not options.is_random:
            return None
        if options.basis_due(state["step"]):
            own = yield from new_basis(shard, options, state["step"])
            shard.held_basis, shard.is_basis_new = (yield shard.compressed.all_gather(own)), True
        return (yield from basis_factors(shard, state, options))

    @staticmethod
    def project(shard: MatrixShard, state: State, options: OnlineSubspaceDescentOptions) -> Program[Projection]:
        """``R = H Q``, in the first step on a basis that is found in this gradient."""
        due = options.basis_due(state["step"])
        own = (yield from new_basis(shard, options, state["step"])) if due else state["basis"]
        return (yield from project_on(shard, own, due, options))  # R = H Q

    @staticmethod
    def update(
        shard: MatrixShard, state: State, options: OnlineSubspaceDescentOptions, found: Projection
    ) -> Program[Update]:
        """Descend along ``scale * rho(R) Q^T``, and move ``Q`` by one step of its own optimizer."""
        state["basis"], shard.held_basis = found.own, None  # the next step has another one, unless it is random
        if options.is_random:
            keep_gathered(shard, options, found.basis, found.due)
        descent = descend(shard, state, options, found.projected, found.basis)
        if options.is_random:
            return (yield from descent)
        is_of_this_gradient = state["step"] == 0 and options.basis_init != "random"
        if is_of_this_gradient or found.is_zero:
            return (yield from descent)
        update: Update
        update, _ = yield from concurrently(descent, move_basis(shard, state, options, found))
        return update


def new_basis(shard: MatrixShard, options: OnlineSubspaceDescentOptions, step: int) -> Program[torch.Tensor]:
    """An orthonormal basis for the first step, or for T steps: matrices x owned compressed rows x rank, fp32.

    A direction that the first gradient does not have is random: a zero column would stay zero forever.
    """
    rank = OnlineSubspaceDescentMethod.rank(shard.shape, options)
    if options.is_random or options.basis_init == "random":
        return (yield from random_basis(shard, rank, options.seed, step // options.update_proj_gap))
    own = yield from leading_basis(shard, rank, options.basis_init, options.seed, 0)
    squares = yield shard.all_reduce(own.square().sum(1, keepdim=True))
    missing = squares < 0.5  # of columns whose length is one or zero
    owned = shard.compressed.owned or [(0, 0)]
    drawn = [normal(options.seed, shard.names, 0, span, (0, rank), shard.device) for span in owned]
    filled: torch.Tensor = own + missing * torch.cat(drawn, dim=1) / math.sqrt(shard.compressed.size)
    return filled


def move_basis(
    shard: MatrixShard, state: State, options: OnlineSubspaceDescentOptions, found: Projection
) -> Program[None]:
    """``Q <- Q - eps_P * (rho_P(grad L(Q)) + wd_P * Q)``.

    The state gets a new tensor: the old basis is still needed for W.
    """
    basis = state["basis"]
    norm = None if options.pca_norm == "projected" else found.are_ordinary
    gradient = yield from pca_gradient(shard, basis, found.projected, options.pca_lambda, found.safe_scale, norm)
    state["basis_steps"] += 1
    inner = options.basis_inner_optimizer
    direction = yield from inner.direction(shard, shard.compressed, state, gradient, state["basis_steps"])  # rho_P
    eps_p = options.basis_lr_ratio * options.effective_lr
    decay = options.weight_decay if options.basis_weight_decay is None else options.basis_weight_decay
    state["basis"] = torch.sub(basis * (1 - eps_p * decay), direction, alpha=eps_p)


def pca_gradient(
    shard: MatrixShard,
    basis: torch.Tensor,
    projected: torch.Tensor,
    pca_lambda: float,
    safe_scale: torch.Tensor,
    are_ordinary: bool | None = False,
) -> Program[torch.Tensor]:
    """The gradient of Equation 6 in closed form, without a compressed x compressed product.

    ``2 / |H|^2 * (Q (R^T R) + (H^T R) (Q^T Q) - 2 H^T R) + 4 lambda Q (Q^T Q - I)``

    ``H^T R`` is linear in ``H`` once ``R`` has been summed over ranks.

    Args:
        shard: the stack, with this step's gradient.
        basis: ``Q``, matrices x owned compressed rows x rank, fp32.
        projected: ``R`` as summed over all ranks, matrices x owned kept rows x rank, fp32.
        pca_lambda: the paper's lambda.
        safe_scale: of the gradients, matrices x 1 x 1.
        are_ordinary: whether the gradients can be squared in fp32, to take their norms; None for ``|H Q|`` instead.

    Returns:
        matrices x owned compressed rows x rank, fp32.
    """
    rank = basis.shape[2]
    projected = projected / safe_scale
    if are_ordinary is None:
        norms = projected.square().sum((1, 2), keepdim=True)
    else:
        norms = squared_norms(shard, shard.kept, shard.gradient, safe_scale, are_ordinary).sum((1, 2), keepdim=True)
    # R^T R, Q^T Q and |H|^2 travel as one small tensor, next to R and to H^T R: two rounds in all.
    squares = torch.cat([projected.mT @ projected, basis.mT @ basis, norms.expand(-1, 1, rank)], dim=1)
    small = shard.replicated_axis(2 * rank + 1)
    tall, squares = yield (
        shard.kept.all_gather(projected),
        small.reduce_scatter(shard.local_contribution(squares)),
    )
    back, squares = yield (
        shard.compressed.reduce_scatter(shard.transposed_times(tall) / safe_scale),  # H^T R
        small.all_gather(squares),
    )
    rtr, qtq, norm_square = torch.split(shard.or_zeros(squares, 2 * rank + 1), [rank, rank, 1], dim=1)
    identity = torch.eye(rank, dtype=basis.dtype, device=basis.device)
    reconstruction = basis @ rtr + back @ (qtq - 2 * identity)  # Q (R^T R) + (H^T R) (Q^T Q) - 2 H^T R
    twice = torch.full_like(norm_square, 2.0)
    gradient: torch.Tensor = safe_ratio(twice, norm_square) * reconstruction  # zero where H Q is
    if pca_lambda:
        gradient = gradient + 4 * pca_lambda * basis @ (qtq - identity)
    return gradient
