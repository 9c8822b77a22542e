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
from ds_lowrank.sharding.reduce import Program, concurrently
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
        beta3 = beta2 if options.beta3 is None else options.beta3
        basis = yield from basis_of_step(shard, state, options, beta3, found)
        projected = gradient @ basis  # R
        moment = state["exp_avg_sq"].mul_(beta2).addcmul_(projected, projected, value=1 - beta2)  # V
        momentum = state["exp_avg"].lerp_(gradient, 1 - beta1)  # M
        if options.nesterov:
            ahead = momentum.lerp(gradient, 1 - beta1) / (1 - beta1 ** (step + 1))  # L
        else:
            ahead = momentum / (1 - beta1**step)
        direction = (ahead @ basis) / ((moment / (1 - beta2**step)).sqrt() + options.eps_at(step))
        gram = shard.local_contribution(projected.mT @ projected)
        whole, gram = yield (
            shard.kept.gather_to_root(torch.cat([ahead, direction], dim=2)),
            shard.replicated_axis(basis.shape[2]).reduce_scatter(gram),
        )
        state["gram"] = beta3 * state["gram"] + (1 - beta3) * gram
        found_on_root = both_parts(whole, basis[rooted(shard)], options.gamma)
        return whole_update(shard, (yield shard.kept.broadcast_from_root(found_on_root)), options.scale)


def rooted(shard: MatrixShard) -> torch.Tensor:
    """The positions of the matrices whose root this rank is, int64."""
    return torch.tensor(shard.rooted, dtype=torch.int64, device=shard.device)


def basis_of_step(
    shard: MatrixShard, state: State, options: CosmosOptions, beta3: float, found: ProjectedGradient
) -> Program[torch.Tensor]:
    """``Q``, and ``C^T S C`` in the place of ``S``. With a gradient of zeros both stay as they are.

    Args:
        shard: the stack, with this step's gradient.
        state: with ``Q`` and ``S``, which are replaced.
        options: with ``projector`` and the seed.
        beta3: the share that ``S`` keeps.
        found: with whole rows of the gradient.

    Returns:
        All rows of ``Q``: matrices x compressed x r, fp32.
    """
    own, small = state["basis"], shard.replicated_axis(state["basis"].shape[2])
    if state["step"] == 0:
        state["basis"] = yield from leading_basis(shard, own.shape[2], options.projector, options.seed, 0)
        return (yield from everywhere(shard, state["basis"]))
    if found.is_zero:
        return (yield from everywhere(shard, own))
    old, gram = yield from concurrently(everywhere(shard, own), replicated(shard, state["gram"]))
    basis = yield from next_basis(shard, options.seed, state["step"], beta3, found, old, gram)
    rotation = old.mT @ basis  # C
    state["basis"], state["gram"] = shard.compressed.own(basis), small.own(rotation.mT @ gram @ rotation)
    return basis


def replicated(shard: MatrixShard, own: torch.Tensor) -> Program[torch.Tensor]:
    """All of ``S``, whose rows are spread over ranks: matrices x r x r, fp32; zeros on a rank without a part."""
    rank = own.shape[2]
    return shard.or_zeros((yield shard.replicated_axis(rank).all_gather(own)), rank)


def next_basis(
    shard: MatrixShard,
    seed: int,
    step: int,
    beta3: float,
    found: ProjectedGradient,
    old: torch.Tensor,
    gram: torch.Tensor,
) -> Program[torch.Tensor]:
    """``qr(beta3 Q_old S + (1 - beta3) H^T H Q_old)``, on the root of each matrix.

    What is sent is of the gradient over its safe scale. The columns of the sum are normalised first, which leaves the
    result of a QR as it is: with squares of singular values for lengths, weaker ones would count as rounding.

    Args:
        shard: the stack.
        seed: the run's seed.
        step: t.
        beta3: the share of ``S``.
        found: with whole rows of the gradient.
        old: ``Q_old``: matrices x compressed x r, fp32.
        gram: ``S``: matrices x r x r, fp32.

    Returns:
        All rows of ``Q``: matrices x compressed x r, fp32.
    """
    size, scale, positions = shard.compressed.size, found.safe_scale, rooted(shard)
    lengths = old.square().sum(1, keepdim=True)
    start = with_lost_columns(shard, old, lengths, seed, step, (0, size))
    tall = found.projected @ start / scale
    axis = shard.replicated_axis(size)
    wide, energies = yield (
        axis.reduce_to_root(shard.local_contribution(found.projected.mT @ tall / scale)),  # H^T H Q_old
        shard.all_reduce(tall.square().sum(1, keepdim=True)),
    )
    old, gram, scale = old[positions].double(), gram[positions].double(), scale[positions].double()
    share = (1 - beta3) * scale.square()
    total = beta3 * old @ gram + share * wide
    energies = beta3 * torch.diagonal(gram, dim1=1, dim2=2).unsqueeze(1) + share * energies[positions]
    is_known = energies > RANK_TOLERANCE**2 * energies.amax(2, keepdim=True)
    norms = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    columns = torch.where(is_known & (norms > 0), total / norms, 0.0)
    new = yield axis.broadcast_from_root(orthonormal_beside_zeros(columns.float()))
    return shard.or_zeros(new, size)


def both_parts(whole: torch.Tensor, bases: torch.Tensor, gamma: float) -> torch.Tensor:
    """``sqrt(D d) X / |X|`` of whole matrices.

    Args:
        whole: ``L`` and Adam's direction ``N`` beside each other: matrices x kept x (compressed + r), fp32.
        bases: ``Q``: matrices x compressed x r, fp32.
        gamma: of the second part.

    Returns:
        matrices x kept x compressed, fp32.
    """
    at_once = max(1, PART_ELEMENTS // max(1, whole.shape[1] * whole.shape[2]))
    parts = []
    for one, basis in zip(torch.split(whole, at_once), torch.split(bases, at_once), strict=True):
        ahead, direction = one.tensor_split([basis.shape[1]], dim=2)
        root_of_size = sqrt(ahead.shape[1] * ahead.shape[2])
        total = direction @ basis.mT + gamma * root_of_size * of_rest(ahead, basis)  # X
        norm = torch.linalg.vector_norm(total, dim=(1, 2), keepdim=True, dtype=torch.float64).float()
        parts.append(root_of_size * safe_ratio(total, norm))
    return torch.cat(parts)


def of_rest(ahead: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """``B``; zero where the rest of ``L`` is rounding.

    NS enlarges small singular values, and so what rounding leaves of ``Q`` in the rest: that is taken out again.

    Args:
        ahead: ``L``: matrices x kept x compressed, fp32.
        basis: ``Q``: matrices x compressed x r, fp32.
    """
    rest = ahead - ahead @ basis @ basis.mT
    norms = [torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64) for x in (ahead, rest)]
    orthogonal = newton_schulz(rest)
    orthogonal = orthogonal - orthogonal @ basis @ basis.mT
    norm = torch.linalg.vector_norm(orthogonal, dim=(1, 2), keepdim=True)
    return torch.where(norms[1] > ROUNDING * norms[0], safe_ratio(orthogonal, norm), 0.0)
