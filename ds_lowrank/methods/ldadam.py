"""LDAdam (Robert et al., arXiv 2410.16103, Algorithm 1): Adam in a subspace that follows the gradient in every step.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x r:

    a <- H + E                                       E is zero without error feedback
    b <- rho m Q_old^T + (1 - rho) a                 with the corrected m = M / (1 - beta1^t), v = V / (1 - beta2^t)
    Q <- qr(b^T b Q_old),  C = Q_old^T Q             one block power iteration; at t = 0 the leading subspace of H
    M' <- M C,  V' <- (1 - beta2^t) |(v - m^2) (C * C) + (m C)^2|
    R <- a Q
    E <- a - R Q^T + beta1 / (1 - beta1) (M Q_old^T - M' Q^T)
    N <- Adam(R)                                     from the moments M' and V'
    W <- W - lr * scale * N Q^T
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.moments import adam, transport
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.basis_options import BasisOptions
from ds_lowrank.methods.blocks.error_feedback import error_spec, held_error, keep_error, product_with_error
from ds_lowrank.methods.blocks.power_iteration import follow_momentum
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.range_finder import leading_basis
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.sharding.elements import Elements
from ds_lowrank.sharding.elementwise import largest_magnitudes
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program, concurrently
from ds_lowrank.sharding.updates import Factors


class LDAdamOptions(BasisOptions):
    """The keys of LDAdam, with the paper's symbols."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*BasisOptions.fixed_on_resume, "rank", "error_feedback")

    betas: tuple[float, float] = (0.908, 0.99)
    """Adam's, of projected matrices and of the other parameters; each in [0, 1)."""
    rank: int = Field(16, gt=0, strict=True)
    """Columns of ``Q``, r; at most the smaller dimension of a matrix."""
    rho: float = Field(0.908, ge=0, lt=1)
    """The share of the momentum in what the basis follows; the rest is the gradient's."""
    error_feedback: bool = Field(False, strict=True)
    """Whether what a step leaves out is kept and added to the next gradient: one more number for every element."""
    projector: Literal["randomized", "svd"] = "randomized"
    """How the first basis is found: by a randomized range finder, or by an exact SVD on one rank."""
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the update of a projected matrix, not its weight decay."""


class LDAdamMethod(Method):
    """LDAdam on the matrices of a stack."""

    name: ClassVar[str] = "LDAdam"
    Options: ClassVar[type[LDAdamOptions]] = LDAdamOptions

    @staticmethod
    def state(shard: MatrixShard, options: LDAdamOptions, rank: int) -> StateSpec:
        """``Q`` compressed x r, Adam's moments kept x r, and with error feedback ``E``, a number for each element."""
        spec: dict[str, TensorSpec | int] = {
            "basis": options.basis_spec(shard, rank),
            "exp_avg": options.first_moment_spec(shard.kept, rank),
            "exp_avg_sq": options.second_moment_spec(shard.kept, rank),
        }
        return spec | {"error": error_spec(shard, options)} if options.error_feedback else spec

    @staticmethod
    def needs_gradient(options: LDAdamOptions) -> str:
        """A step finds a new basis in the gradient."""
        return "it finds a new basis in every gradient: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: LDAdamOptions) -> Program[ProjectedGradient]:
        """The gradient itself is what is found: the next basis takes the momentum, which only ``update`` has.

        Later bases are moves of the first one, and no refreshes.
        """
        yield from ()
        return ProjectedGradient(largest_magnitudes(shard), due=state["step"] == 0)

    @staticmethod
    def update(shard: MatrixShard, state: State, options: LDAdamOptions, found: ProjectedGradient) -> Program[Factors]:
        """Move the basis and the moments, and descend along ``scale * N Q^T``."""
        error = (yield from held_error(shard, state, "error")) if options.error_feedback else None
        old, momentum, moments = state["basis"], state["exp_avg"].clone(), (state["exp_avg"], state["exp_avg_sq"])
        moves = state["step"] > 0 and (error is not None or not found.is_zero)
        if state["step"] == 0:
            rank = old.shape[2]
            state["basis"] = yield from leading_basis(shard, rank, options.projector, options.seed, 0)
        elif moves:
            corrected = momentum / (1 - options.betas[0] ** state["step"])  # m
            state["basis"] = yield from follow_momentum(
                shard, old, corrected, options.rho, error, options.seed, state["step"]
            )
        rotation, (basis, projected) = yield from concurrently(
            shard.replicated_sum(old.mT @ state["basis"]), project(shard, error, state["basis"])
        )  # C = Q_old^T Q and R = a Q
        if moves:
            transport(*moments, rotation, options.betas, state["step"])
        share = options.betas[0] / (1 - options.betas[0])
        taken = [projected + share * moments[0], -share * momentum]  # R Q^T + share (M' Q^T - M Q_old^T)
        direction = adam(*moments, projected, options.betas, options.eps_at(state["step"] + 1), state["step"] + 1)  # N
        if error is None:
            return Factors((yield shard.kept.all_gather(direction)), basis, options.scale)
        held, before = yield shard.kept.all_gather(torch.cat([direction, *taken], 2)), shard.compressed.all_gather(old)
        direction, of_error = held.tensor_split([basis.shape[2]], dim=2)
        yield from keep_error(shard, state, "error", error, Factors(of_error, torch.cat([basis, before], 2), 1.0))
        return Factors(direction, basis, options.scale)


def project(
    shard: MatrixShard, error: Elements | None, own: torch.Tensor
) -> Program[tuple[torch.Tensor, torch.Tensor]]:
    """``Q``, matrices x held compressed rows x rank, and ``R = a Q``, matrices x owned kept rows x rank; fp32."""
    basis = yield shard.compressed.all_gather(own)
    return basis, (yield shard.kept.reduce_scatter(product_with_error(shard, error, basis)))
