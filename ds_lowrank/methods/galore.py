"""GaLore (Zhao et al., arXiv 2403.03507, Algorithm 2): Adam in a subspace of the gradient.

With the compressed dimension second, ``H`` is kept x compressed and ``Q`` compressed x rank:

    every T steps    Q <- leading subspace of H
    R <- H Q         (Definition 3.6, one side)
    N <- rho(R)      (Adam, or another inner optimizer)
    W <- W - lr * scale * N Q^T
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.sketch import name_hash
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.range_finder import randomized_range, singular_basis
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import Projection, SubspaceOptions, descend, project_on, subspace_state
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Factors


class GaLoreOptions(SubspaceOptions):
    """GaLore's own keys, in its spelling, beside the common ones."""

    update_proj_gap: int = Field(200, gt=0, strict=True)
    """T, in optimizer steps."""
    projector: Literal["randomized", "svd"] = "randomized"
    moments: Literal["keep", "rotate"] = "keep"
    """What a refresh does to Adam's moments: the official code keeps them in the old coordinates."""
    stagger: bool = Field(False, strict=True)
    """Spread the refreshes of the matrices over the interval instead of doing them all in one step."""

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.moments == "rotate" and (self.inner == "adafactor" or (self.inner == "sgd" and not self.momentum)):
            raise ValueError(f"inner {self.inner!r} has no moments that 'rotate' could carry: set moments to 'keep'")


class GaLore(Method):
    """GaLore on one matrix."""

    name: ClassVar[str] = "GaLore"
    Options: ClassVar[type[GaLoreOptions]] = GaLoreOptions

    @staticmethod
    def state(shard: MatrixShard, options: GaLoreOptions, rank: int) -> StateSpec:
        return subspace_state(shard, options, rank)

    @staticmethod
    def project(shard: MatrixShard, state: State, options: GaLoreOptions, step: int) -> Program[Projection]:
        due = refresh_due(shard.name, options, step)
        own = (yield from new_basis(shard, options, step)) if due else state["basis"]
        return (yield from project_on(shard, own, refreshed=due))

    @staticmethod
    def update(
        shard: MatrixShard, state: State, options: GaLoreOptions, step: int, found: Projection
    ) -> Program[Factors | Dense]:
        basis = found.basis
        if found.is_zero:
            # No subspace can be read off it: the old basis stays until the next refresh.
            found.refreshed = False
            basis = yield shard.compressed.all_gather(state["basis"])
        elif found.refreshed:
            yield from change_basis(shard, state, options, found.own, first=step == 0)
        return (yield from descend(shard, state, options, step, found.projected, basis))


def refresh_due(name: str, options: GaLoreOptions, step: int) -> bool:
    """Steps 0, T, 2T, ...; staggered, the later ones are moved by an offset that is a function of the name."""
    offset = name_hash("stagger", name) % options.update_proj_gap if options.stagger else 0
    return step == 0 or (step + offset) % options.update_proj_gap == 0


def new_basis(shard: MatrixShard, options: GaLoreOptions, step: int) -> Program[torch.Tensor]:
    """This rank's own rows of an orthonormal basis of the gradient's leading subspace, compressed x rank."""
    rank = GaLore.rank(shard.shape, options)
    if options.projector == "svd":
        return (yield from singular_basis(shard, rank))
    return (yield from randomized_range(shard, rank, options.seed, step))


def change_basis(
    shard: MatrixShard, state: State, options: GaLoreOptions, new: torch.Tensor, first: bool
) -> Program[None]:
    """Store this rank's own rows of a new basis and, if asked, carry the moments into it."""
    if options.moments == "rotate" and not first:
        options.inner_optimizer.rotate(state, (yield from shard.replicated_sum(state["basis"].T @ new)))
    state["basis"].copy_(new)
