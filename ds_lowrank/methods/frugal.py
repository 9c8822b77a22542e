"""FRUGAL (Zmushko et al., arXiv 2411.07837): Adam in a subspace, and signs of the gradient outside of it.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x r:

    every T steps    Q <- a new subspace; the moments start again from zero
    R <- H Q
    N <- Adam(R)                                      the state-full part (or another inner optimizer)
    F <- sign(H - R Q^T)                              the state-free part; ``state_free`` sgd: H - R Q^T
    W <- W - lr * scale * (N Q^T + c F)               c is ``state_free_lr_scale``

The subspace is the gradient's leading one, a random one, or r random columns of ``H``: ``Q`` then has one 1 a column.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.sketch import normal
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.rest import with_rest, with_sign_of_rest
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.methods.blocks.subspace import Projection, basis_of_step, project_on
from ds_lowrank.methods.galore import (
    GaLoreMethod,
    GaLoreOptions,
    basis_due,
    change_basis,
    galore_state,
)
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Update


class FrugalOptions(GaLoreOptions):
    """The keys of FRUGAL, in addition to GaLore's."""

    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies both parts of the update of a projected matrix, not its weight decay."""
    projector: Literal["randomized", "svd", "random", "columns"] = "randomized"  # type: ignore[assignment]
    """Which subspace: the gradient's leading one by a range finder or an SVD, a random one, or random columns."""
    moments: Literal["reset", "keep", "rotate"] = "reset"  # type: ignore[assignment]
    """What a refresh does to the moments."""
    state_free: Literal["sign", "sgd"] = "sign"
    """The rule of what the subspace leaves out of the gradient."""
    state_free_lr_scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """c: the rate of that rule, relative to ``lr * scale``."""

    def model_post_init(self, context: Any) -> None:
        """Refuse a direction that is not in the subspace."""
        super().model_post_init(context)
        if self.lion_sign == "original":
            raise ValueError("FRUGAL adds a direction in the subspace to the rest: set lion_sign to 'subspace'")


class FrugalMethod(Method):
    """FRUGAL on the matrices of a stack."""

    name: ClassVar[str] = "Frugal"
    Options: ClassVar[type[FrugalOptions]] = FrugalOptions

    @staticmethod
    def phase(name: str, step: int, options: FrugalOptions) -> bool:
        """Whether a staggered refresh is due."""
        return GaLoreMethod.phase(name, step, options)

    @staticmethod
    def state(shard: MatrixShard, options: FrugalOptions, rank: int) -> StateSpec:
        """The basis, compressed x r, the moments, kept x r, and the number of steps since they started."""
        return {**galore_state(shard, options, rank), "age": 0}

    @staticmethod
    def needs_gradient(options: FrugalOptions) -> str:
        """A step adds what the subspace leaves out of the gradient."""
        return "it steps on what the subspace leaves out of the whole gradient: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: FrugalOptions) -> Program[Projection]:
        """Find the subspace if it is due, and project: ``R = H Q``."""
        if options.projector != "columns" or not basis_due(shard, state, options):
            return (yield from GaLoreMethod.project(shard, state, options))
        own = random_columns(shard, min(options.rank, *shard.shape), options.seed, state["step"])
        return (yield from project_on(shard, own, True, options))  # R = H Q

    @staticmethod
    def update(shard: MatrixShard, state: State, options: FrugalOptions, found: Projection) -> Program[Update]:
        """The update ``scale * (N Q^T + c F)``."""
        basis = yield from basis_of_step(shard, state, options, found)
        if found.refreshed:
            yield from change_basis(shard, state, options, found.own)
            if options.moments == "reset":
                reset(shard, state, options)
        state["age"] += 1
        projected, scale, c = found.projected, options.scale, options.state_free_lr_scale
        inner = options.inner_optimizer
        direction = yield from inner.direction(shard, shard.kept, state, projected, state["age"])  # N
        if options.state_free == "sgd":
            shares = torch.full_like(projected[..., :1], c)
            return (yield from with_rest(shard, direction, projected, basis, shares, scale))
        squares = yield shard.kept.reduce_scatter(found.gradient_squares(shard, options))
        row_norms = squares.sqrt() * found.safe_scale  # |H_i|
        return (yield from with_sign_of_rest(shard, direction, projected, basis, row_norms, c, scale))


def random_columns(shard: MatrixShard, rank: int, seed: int, counter: int) -> torch.Tensor:
    """A basis of r columns of ``H``, those with the smallest of random numbers, a function of (seed, name, counter).

    Args:
        shard: the stack.
        rank: r.
        seed: the run's seed.
        counter: the step.

    Returns:
        matrices x owned compressed rows x r, fp32: row i has a 1 where column i of ``H`` is one of the r.
    """
    axis = shard.compressed
    keys = normal(seed, shard.names, counter, (0, axis.size), (0, 1), shard.device).squeeze(2)
    chosen = keys.argsort(dim=1, stable=True)[:, :rank]
    places = torch.arange(axis.size, dtype=torch.int64, device=shard.device).expand(len(shard), -1)
    return (axis.own(places.unsqueeze(2)) == chosen.unsqueeze(1)).float()


def reset(shard: MatrixShard, state: State, options: FrugalOptions) -> None:
    """Set what the inner optimizer keeps to zero, also its number of steps."""
    rank = min(options.rank, *shard.shape)
    for key, spec in options.inner_optimizer.state(shard, shard.kept, rank).items():
        if isinstance(spec, TensorSpec):
            state[key].zero_()
    state["age"] = 0
