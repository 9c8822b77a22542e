"""Online Subspace Descent (Liang et al., arXiv 2408.12857, Algorithm 1): the basis moves a little in every step.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x rank; ``eps_P = alpha lr``:

    R <- H Q
    W <- W - lr * scale * rho(R) Q^T - lr * wd * W
    Q <- Q - eps_P * (rho_P(grad L(Q)) + wd_P * Q)        with the Q that was used for W

    L(Q) = |H~ Q Q^T - H~|^2 + lambda |Q^T Q - I|^2,  H~ = H / |H|        (Equation 6)

With ``pca_norm`` ``projected`` it is ``H~ = H / |H Q|``, which is known where only projections of gradients are summed.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.orthonormal import orthonormal
from ds_lowrank.linalg.sketch import normal
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.inner_optimizers import InnerOptimizer, make_inner_optimizer
from ds_lowrank.methods.blocks.projection import safe_ratio
from ds_lowrank.methods.blocks.range_finder import randomized_range, singular_basis
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import Projection, SubspaceOptions, descend, project_on, subspace_state
from ds_lowrank.sharding.elementwise import squared_norms
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program, concurrently, without_rounds
from ds_lowrank.sharding.updates import Update


class OnlineSubspaceDescentOptions(SubspaceOptions):
    """The keys of Online Subspace Descent."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*SubspaceOptions.fixed_on_resume, "basis_optimizer")

    pca_lambda: float = Field(0.1, ge=0, allow_inf_nan=False)
    """lambda: the weight of the term that keeps the basis near orthonormal."""
    basis_lr_ratio: float = Field(5.0, ge=0, allow_inf_nan=False)
    """alpha: the basis moves at ``alpha * lr``."""
    basis_optimizer: Literal["adam", "sgd", "lion", "adafactor"] = "adam"
    """rho_P: what turns the gradient of the PCA loss into a direction."""
    basis_init: Literal["svd", "randomized", "random"] = "randomized"
    """The first basis: of the first gradient, or a random orthonormal one."""
    pca_norm: Literal["gradient", "projected"] = "gradient"
    """What the gradient is divided by in the PCA loss: its norm, or that of its projection ``H Q``."""
    basis_weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False)
    """The decoupled weight decay of the basis. None: ``weight_decay``, as in Algorithm 1."""

    def model_post_init(self, context: Any) -> None:
        """Refuse a basis in so few bits that a step of its optimizer would be lost."""
        super().model_post_init(context)
        if self.basis_dtype == "int4":
            raise ValueError(
                "basis_dtype 'int4' loses the small steps that the basis takes: set it to 'bf16' or 'fp32'"
            )

    @property
    def basis_inner_optimizer(self) -> InnerOptimizer:
        """The optimizer of the basis, rho_P."""
        return make_inner_optimizer(self.basis_optimizer, self, prefix="basis_")


class OnlineSubspaceDescentMethod(Method):
    """Online Subspace Descent on the matrices of a stack."""

    name: ClassVar[str] = "OnlineSubspaceDescent"
    Options: ClassVar[type[OnlineSubspaceDescentOptions]] = OnlineSubspaceDescentOptions

    @staticmethod
    def state(shard: MatrixShard, options: OnlineSubspaceDescentOptions, rank: int) -> StateSpec:
        """``Q`` compressed x rank with the moments of its own optimizer, and rho's moments, kept x rank."""
        return {
            **subspace_state(shard, options, rank),
            **options.basis_inner_optimizer.state(shard, shard.compressed, rank),
            "basis_steps": 0,
        }

    @staticmethod
    def needs_gradient(options: OnlineSubspaceDescentOptions) -> str | None:
        """A step needs ``|H|``, unless ``pca_norm`` is ``projected``."""
        if options.pca_norm == "gradient":
            return (
                "its loss divides by the norm of the summed gradient, which nobody has: set pca_norm to 'projected', "
                "or reduction to 'gradient'"
            )
        return None

    @staticmethod
    @without_rounds
    def factors(shard: MatrixShard, state: State, options: OnlineSubspaceDescentOptions) -> None:
        """None: every step multiplies the gradient once more, by ``R``, which is known once all have summed it."""

    @staticmethod
    def project(shard: MatrixShard, state: State, options: OnlineSubspaceDescentOptions) -> Program[Projection]:
        """``R = H Q``, in the first step on a basis that is found in this gradient."""
        first = state["step"] == 0
        own = (yield from first_basis(shard, options)) if first else state["basis"]
        return (yield from project_on(shard, own, first, options))  # R = H Q

    @staticmethod
    def update(
        shard: MatrixShard, state: State, options: OnlineSubspaceDescentOptions, found: Projection
    ) -> Program[Update]:
        """Descend along ``scale * rho(R) Q^T``, and move ``Q`` by one step of its own optimizer."""
        state["basis"], shard.held_basis = found.own, None  # the next step has another one
        descent = descend(shard, state, options, found.projected, found.basis)
        is_of_this_gradient = state["step"] == 0 and options.basis_init != "random"
        if is_of_this_gradient or found.is_zero:
            return (yield from descent)
        update: Update
        update, _ = yield from concurrently(descent, move_basis(shard, state, options, found))
        return update


def first_basis(shard: MatrixShard, options: OnlineSubspaceDescentOptions) -> Program[torch.Tensor]:
    """An orthonormal basis for the first step: matrices x owned compressed rows x rank, fp32.

    A direction that the first gradient does not have is random: a zero column would stay zero forever.
    """
    rank = OnlineSubspaceDescentMethod.rank(shard.shape, options)
    size = shard.compressed.size
    if options.basis_init == "random":
        rooted = [shard.names[i] for i in shard.rooted]
        random = orthonormal(normal(options.seed, rooted, 0, (0, size), (0, rank), shard.device))
        own: torch.Tensor = yield shard.compressed.scatter_from_root(random)
        return own
    if options.basis_init == "svd":
        own = yield from singular_basis(shard, rank)
    else:
        own = yield from randomized_range(shard, rank, options.seed, 0)
    squares = yield shard.all_reduce(own.square().sum(1, keepdim=True))
    missing = squares < 0.5  # of columns whose length is one or zero
    owned = shard.compressed.owned or [(0, 0)]
    drawn = [normal(options.seed, shard.names, 0, span, (0, rank), shard.device) for span in owned]
    filled: torch.Tensor = own + missing * torch.cat(drawn, dim=1) / math.sqrt(size)
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
