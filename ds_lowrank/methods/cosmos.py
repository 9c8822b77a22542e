"""COSMOS (Liu et al., arXiv 2502.17410): SOAP's Adam in a leading subspace that moves in every step, Muon on the rest.

With the compressed dimension second, ``H`` is D x d: kept x compressed, ``Q`` compressed x r and ``S`` r x r:

    M <- beta1 M + (1 - beta1) H
    Q <- qr(beta3 Q_old S + (1 - beta3) H^T H Q_old),  C = Q_old^T Q          at t = 0 the leading subspace of H
    S <- beta3 C^T S C + (1 - beta3) R^T R,  R = H Q
    V <- beta2 V + (1 - beta2) R^2
    L <- M / (1 - beta1^t')                     nesterov: (beta1 M + (1 - beta1) H) / (1 - beta1^(t' + 1)),  t' = t + 1
    A <- L Q / (sqrt(V / (1 - beta2^t')) + eps) Q^T
    B <- NS(L - L Q Q^T) / |NS(L - L Q Q^T)|                                  NS is Muon's Newton-Schulz iteration
    X <- A + gamma sqrt(D d) B
    W <- W - lr * scale * sqrt(D d) X / |X|

``Q_old S Q_old^T`` stands for an average of ``H^T H``, of which ``Q`` is one block power iteration. ``X`` is formed on
the root of each matrix.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.orthonormal import PART_ELEMENTS
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.basis_options import BasisOptions
from ds_lowrank.methods.blocks.power_iteration import follow_gram
from ds_lowrank.methods.blocks.projection import ProjectedGradient, safe_ratio
from ds_lowrank.methods.blocks.range_finder import leading_basis
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.whole import everywhere, orthogonalized_rest, own_rows, whole_update
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.precision import products_in
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Update


class CosmosOptions(BasisOptions):
    """The keys of COSMOS."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*BasisOptions.fixed_on_resume, "rank")

    betas: tuple[float, float] = (0.95, 0.95)
    """``beta1`` and ``beta2``, also Adam's of the other parameters; each in [0, 1)."""
    beta3: float | None = Field(None, ge=0, lt=1)
    """Of the average of ``H^T H`` that the basis follows. None: ``beta2``."""
    rank: int = Field(64, gt=0, strict=True)
    """Columns of ``Q``, r; at most the smaller dimension of a matrix."""
    gamma: float = Field(0.2, ge=0, allow_inf_nan=False)
    """The weight of Muon's part: its root mean square, where Adam's is about ``sqrt(r / d)``."""
    nesterov: bool = Field(True, strict=True)
    """Whether the momentum is looked at a step ahead."""
    projector: Literal["randomized", "svd"] = "randomized"
    """How the first basis is found: by a randomized range finder, or by an exact SVD on one rank."""
    scale: float = Field(0.2, ge=0, allow_inf_nan=False)
    """The root mean square of a projected matrix's update; not of its weight decay."""

    @property
    def basis_beta(self) -> float:
        """beta3."""
        return self.betas[1] if self.beta3 is None else self.beta3


class CosmosMethod(Method):
    """COSMOS on the matrices of a stack."""

    name: ClassVar[str] = "Cosmos"
    Options: ClassVar[type[CosmosOptions]] = CosmosOptions

    @staticmethod
    def state(shard: MatrixShard, options: CosmosOptions, rank: int) -> StateSpec:
        """``Q`` compressed x r, ``S`` r x r, ``M`` kept x compressed, a number for each element, and ``V`` kept x r."""
        return {
            "basis": options.basis_spec(shard, rank),
            "gram": TensorSpec(shard.replicated_axis(rank), rank),
            "exp_avg": options.first_moment_spec(shard.kept, shard.compressed.size),
            "exp_avg_sq": options.second_moment_spec(shard.kept, rank),
        }

    @staticmethod
    def needs_gradient(options: CosmosOptions) -> str:
        """A step finds a new basis in the gradient, and adds all of it to the momentum."""
        return "it finds a new basis in every gradient, and averages all of it: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: CosmosOptions) -> Program[ProjectedGradient]:
        """Whole rows of the gradient: ``H``, matrices x owned kept rows x compressed."""
        return ProjectedGradient((yield from own_rows(shard)), due=state["step"] == 0)

    @staticmethod
    def update(shard: MatrixShard, state: State, options: CosmosOptions, found: ProjectedGradient) -> Program[Update]:
        """Move the basis, update the averages, and descend along both parts."""
        gradient, step, (beta1, beta2) = found.projected, state["step"] + 1, options.betas
        basis = yield from basis_of_step(shard, state, options, found)
        with products_in(shard.precision, shard.device):
            projected = gradient @ basis  # R
        moment = state["exp_avg_sq"].mul_(beta2).addcmul_(projected, projected, value=1 - beta2)  # V
        momentum = state["exp_avg"].lerp_(gradient, 1 - beta1)  # M
        if options.nesterov:
            ahead = momentum.lerp(gradient, 1 - beta1) / (1 - beta1 ** (step + 1))  # L
        else:
            ahead = momentum / (1 - beta1**step)
        direction = (ahead @ basis) / ((moment / (1 - beta2**step)).sqrt() + options.eps_at(step))
        whole, gram = yield (
            shard.kept.gather_to_root(torch.cat([ahead, direction], dim=2)),
            shard.replicated_axis(basis.shape[2]).reduce_scatter(shard.local_contribution(projected.mT @ projected)),
        )
        state["gram"] = options.basis_beta * state["gram"] + (1 - options.basis_beta) * gram
        combined = both_parts(whole, shard.of_rooted(basis), options.gamma)
        return whole_update(shard, (yield shard.kept.broadcast_from_root(combined)), options.scale)


def basis_of_step(
    shard: MatrixShard, state: State, options: CosmosOptions, found: ProjectedGradient
) -> Program[torch.Tensor]:
    """All rows of ``Q``: matrices x compressed x r, fp32. With a gradient of zeros it stays as it is.

    Args:
        shard: the stack, with this step's gradient.
        state: with ``Q``, which is replaced, and ``S``, which becomes ``C^T S C``.
        options: with ``beta3``, ``projector`` and the seed.
        found: with whole rows of the gradient.
    """
    own, rank = state["basis"], state["basis"].shape[2]
    if state["step"] == 0:
        own = state["basis"] = yield from leading_basis(shard, rank, options.projector, options.seed, 0)
    old = yield from everywhere(shard, own)
    if state["step"] == 0 or found.is_zero:
        return old
    basis, gram = yield from follow_gram(
        shard, old, state["gram"], options.basis_beta, found, options.seed, state["step"]
    )
    rotation = old.mT @ basis  # C
    state["basis"] = shard.compressed.own(basis)
    state["gram"] = shard.replicated_axis(rank).own(rotation.mT @ gram @ rotation)
    return basis


def both_parts(whole: torch.Tensor, bases: torch.Tensor, gamma: float) -> torch.Tensor:
    """``sqrt(D d) X / |X|`` of whole matrices: matrices x kept x compressed, fp32.

    Args:
        whole: ``L`` and, beside it, the factor of ``A`` before ``Q^T``: matrices x kept x (compressed + r), fp32.
        bases: ``Q``: matrices x compressed x r, fp32.
        gamma: of the second part.
    """
    at_once, parts = max(1, PART_ELEMENTS // max(1, whole.shape[1] * whole.shape[2])), []
    root_of_size = sqrt(whole.shape[1] * bases.shape[1])
    for one, basis in zip(torch.split(whole, at_once), torch.split(bases, at_once), strict=True):
        ahead, direction = one.tensor_split([basis.shape[1]], dim=2)
        total = direction @ basis.mT + gamma * root_of_size * orthogonalized_rest(ahead, basis)  # X
        norm = torch.linalg.vector_norm(total, dim=(1, 2), keepdim=True, dtype=torch.float64).float()
        parts.append(root_of_size * safe_ratio(total, norm))
    return torch.cat(parts)
