"""What the methods with a stored basis and a free choice of inner optimizer share: GaLore's Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.methods.blocks.inner_optimizers import InnerOptimizer, InnerOptimizerName, Lion, make_inner_optimizer
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.state_spec import State, StateSpec, TensorSpec
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Factors


class SubspaceOptions(Options):
    """The keys of GaLore and Online Subspace Descent."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*Options.fixed_on_resume, "rank", "inner")

    rank: int = Field(128, gt=0, strict=True)
    scale: float = Field(0.25, ge=0, allow_inf_nan=False)
    """The paper's alpha: multiplies the update of a projected matrix, not its weight decay."""
    inner: InnerOptimizerName = "adamw"
    """rho: what turns the projected gradient into a direction."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of ``inner`` ``sgd``."""
    lion_sign: Literal["subspace", "original"] = "subspace"
    """Where ``inner`` ``lion`` takes its sign: before the lift (the paper), or after it (the official code)."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.momentum and self.inner != "sgd":
            raise ValueError(f"momentum belongs to inner 'sgd', inner is {self.inner!r}: remove one of them")
        if self.lion_sign == "original" and self.inner != "lion":
            raise ValueError(f"lion_sign belongs to inner 'lion', inner is {self.inner!r}: remove one of them")

    @property
    def inner_optimizer(self) -> InnerOptimizer:
        return make_inner_optimizer(self.inner, self, momentum=self.momentum)


@dataclass
class Projection(ProjectedGradient):
    """``projected``: owned kept rows x rank, ``R = H Q``.

    Attributes:
        own: owned compressed rows x rank: this rank's rows of the basis.
        basis: held compressed rows x rank, fp32: the rows of the basis that this rank computes with.
    """

    own: torch.Tensor = field(kw_only=True)
    basis: torch.Tensor = field(kw_only=True)


def subspace_state(shard: MatrixShard, options: SubspaceOptions, rank: int) -> StateSpec:
    """The basis, and the moments of the inner optimizer."""
    return {"basis": TensorSpec(shard.compressed, rank), **options.inner_optimizer.state(shard, shard.kept, rank)}


def project_on(shard: MatrixShard, own: torch.Tensor, refreshed: bool) -> Program[Projection]:
    """``R = H Q`` for a basis of which this rank owns ``own``."""
    basis = yield shard.compressed.all_gather(own)
    projected = yield shard.kept.reduce_scatter(shard.times(basis))
    return Projection(projected, refreshed, own=own, basis=basis)


def descend(
    shard: MatrixShard, state: State, options: SubspaceOptions, step: int, projected: torch.Tensor, basis: torch.Tensor
) -> Program[Factors | Dense]:
    """``N <- rho(R)``; the update is ``scale * N Q^T``.

    Args:
        projected: owned kept rows x rank.
        basis: held compressed rows x rank.
    """
    rule = options.inner_optimizer
    if isinstance(rule, Lion) and options.lion_sign == "original":
        mixed = yield shard.kept.all_gather(rule.interpolated(state, projected))
        factors = Factors(mixed, basis, options.scale)
        return Dense(lambda: shard.lifted(factors).sign_(), options.scale)
    direction = yield from rule.direction(shard, shard.kept, state, projected, step + 1)
    direction = yield shard.kept.all_gather(direction)
    return Factors(direction, basis, options.scale)
