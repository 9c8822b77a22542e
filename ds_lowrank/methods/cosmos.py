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

from ds_lowrank.linalg.orthonormal import PART_ELEMENTS, RANK_TOLERANCE, orthonormal_beside_zeros
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.basis_options import BasisOptions
from ds_lowrank.methods.blocks.orthogonalize import newton_schulz, whole_update
from ds_lowrank.methods.blocks.projection import ProjectedGradient, safe_ratio
from ds_lowrank.methods.blocks.range_finder import leading_basis, with_lost_columns
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.whole import everywhere, own_rows
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.precision import products_in
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Update

ROUNDING = 1e-5
"""A rest of the momentum that is shorter than this, relative to all of it, is fp32 rounding, which NS would enlarge."""


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
        combined = both_parts(whole, basis[rooted(shard)], options.gamma)
        return whole_update(shard, (yield shard.kept.broadcast_from_root(combined)), options.scale)


def rooted(shard: MatrixShard) -> torch.Tensor:
    """The positions of the matrices whose root this rank is, int64."""
    return torch.tensor(shard.rooted, dtype=torch.int64, device=shard.device)


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
    basis, gram = yield from next_basis(shard, state, options, found, old)
    rotation = old.mT @ basis  # C
    state["basis"] = shard.compressed.own(basis)
    state["gram"] = shard.replicated_axis(rank).own(rotation.mT @ gram @ rotation)
    return basis


def next_basis(
    shard: MatrixShard, state: State, options: CosmosOptions, found: ProjectedGradient, old: torch.Tensor
) -> Program[tuple[torch.Tensor, torch.Tensor]]:
    """``qr(beta3 Q_old S + (1 - beta3) H^T H Q_old)``, on the root of each matrix, and all of ``S``.

    What is sent is of the gradient over its safe scale. The columns of the sum are normalised first, which leaves the
    result of a QR as it is: with squares of singular values for lengths, weaker ones would count as rounding.

    Args:
        shard: the stack.
        state: with ``S`` as it is stored.
        options: with ``beta3`` and the seed.
        found: with whole rows of the gradient.
        old: ``Q_old``: matrices x compressed x r, fp32.

    Returns:
        matrices x compressed x r and matrices x r x r, fp32; zeros on a rank without a part of the matrices.
    """
    size, rank, scale, beta3 = shard.compressed.size, old.shape[2], found.safe_scale, options.basis_beta
    lengths, axis = old.square().sum(1, keepdim=True), shard.replicated_axis(size)
    with products_in(shard.precision, shard.device):
        tall = found.projected @ with_lost_columns(shard, old, lengths, options.seed, state["step"], (0, size)) / scale
        wide = found.projected.mT @ tall / scale  # H^T H Q_old
    wide, energies, gram = yield (
        axis.reduce_to_root(shard.local_contribution(wide)),
        shard.all_reduce(tall.square().sum(1, keepdim=True)),
        shard.replicated_axis(rank).all_gather(state["gram"]),
    )
    gram, on_root = shard.or_zeros(gram, rank), rooted(shard)
    held, share = gram[on_root].double(), (1 - beta3) * scale[on_root].double().square()
    total = beta3 * old[on_root].double() @ held + share * wide
    energies = beta3 * torch.diagonal(held, dim1=1, dim2=2).unsqueeze(1) + share * energies[on_root]
    is_known = energies > RANK_TOLERANCE**2 * energies.amax(2, keepdim=True)
    norms = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    columns = torch.where(is_known & (norms > 0), total / norms, 0.0)
    new = yield axis.broadcast_from_root(orthonormal_beside_zeros(columns.float()))
    return shard.or_zeros(new, size), gram


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
        total = direction @ basis.mT + gamma * root_of_size * of_rest(ahead, basis)  # X
        norm = torch.linalg.vector_norm(total, dim=(1, 2), keepdim=True, dtype=torch.float64).float()
        parts.append(root_of_size * safe_ratio(total, norm))
    return torch.cat(parts)


def of_rest(ahead: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """``B``: matrices x kept x compressed, fp32; zero where the rest of ``L`` is rounding.

    NS enlarges small singular values, and so what rounding leaves of ``Q`` in the rest: that is taken out again.

    Args:
        ahead: ``L``: matrices x kept x compressed, fp32.
        basis: ``Q``: matrices x compressed x r, fp32.
    """
    with products_in("fp32", ahead.device):
        rest = ahead - ahead @ basis @ basis.mT
        found = newton_schulz(rest)
        found = found - found @ basis @ basis.mT
    all_of_it, left, orthogonal = (
        torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64) for x in (ahead, rest, found)
    )
    return torch.where(left > ROUNDING * all_of_it, safe_ratio(found, orthogonal.float()), 0.0)
