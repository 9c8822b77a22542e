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
from ds_lowrank.methods.blocks.lazy_refresh import LazyRefreshOptions, note_similarity
from ds_lowrank.methods.blocks.random_basis import random_basis
from ds_lowrank.methods.blocks.range_finder import randomized_range, singular_basis
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import (
    BasisPlacement,
    Projection,
    basis_factors,
    basis_of_step,
    descend,
    project_on,
    subspace_state,
)
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Factors


class GaLoreOptions(LazyRefreshOptions):
    """The keys of GaLore, in its own spelling."""

    projector: Literal["randomized", "svd"] = "randomized"
    """How the leading subspace is found: by a randomized range finder, or by an exact SVD on one rank."""
    moments: Literal["keep", "rotate"] = "keep"
    """What a refresh does to Adam's moments: the official code keeps them in the old coordinates."""
    basis_placement: BasisPlacement = "partitioned"
    """Whether a rank stores the rows of a basis that it owns, or keeps all that it computes with between refreshes."""
    first_basis: Literal["gradient", "random"] = "gradient"
    """What the first basis is taken from: the first gradient, or random numbers, so that with ``stagger`` a first step
    needs no whole gradients either."""
    stagger: bool = Field(False, strict=True)
    """Spread the refreshes of the matrices over the interval instead of doing them all in one step."""

    def model_post_init(self, context: Any) -> None:
        """Refuse to rotate moments that the inner optimizer does not have."""
        super().model_post_init(context)
        if self.moments == "rotate" and (self.inner == "adafactor" or (self.inner == "sgd" and not self.momentum)):
            raise ValueError(f"inner {self.inner!r} has no moments that 'rotate' could carry: set moments to 'keep'")
        if self.is_lazy and self.stagger:
            raise ValueError("cos_threshold lets every matrix refresh at a time of its own: set stagger to false")


class GaLoreMethod(Method):
    """GaLore on the matrices of a stack."""

    name: ClassVar[str] = "GaLore"
    Options: ClassVar[type[GaLoreOptions]] = GaLoreOptions

    @staticmethod
    def phase(name: str, step: int, options: GaLoreOptions) -> bool:
        """Whether a staggered refresh is due."""
        return options.stagger and refresh_due(name, options, step)

    @staticmethod
    def state(shard: MatrixShard, options: GaLoreOptions, rank: int) -> StateSpec:
        """The basis, compressed x rank, and the inner optimizer's moments, kept x rank."""
        return galore_state(shard, options, rank)

    @staticmethod
    def needs_gradient(options: GaLoreOptions) -> None:
        """An ordinary step needs ``R = H Q`` only."""

    @staticmethod
    def factors(shard: MatrixShard, state: State, options: GaLoreOptions) -> Program[Sums | None]:
        """``Q``; None if a new one is due, which is found in the gradient."""
        if state["step"] == 0 and options.first_basis == "random":
            shard.held_basis = yield shard.compressed.all_gather((yield from first_random_basis(shard, options)))
            return (shard.held_basis,)
        if basis_due(shard, state, options):
            return None
        return (yield from basis_factors(shard, state))

    @staticmethod
    def project(shard: MatrixShard, state: State, options: GaLoreOptions) -> Program[Projection]:
        """Find the basis if it is due, and project: ``R = H Q``."""
        due = basis_due(shard, state, options)
        own = (yield from new_basis(shard, options, state["step"])) if due else state["basis"]
        return (yield from project_on(shard, own, due, options))  # R = H Q

    @staticmethod
    def update(shard: MatrixShard, state: State, options: GaLoreOptions, found: Projection) -> Program[Factors | Dense]:
        """Store a new basis, and descend along ``scale * N Q^T``."""
        basis = yield from basis_of_step(shard, state, options, found)
        if found.refreshed:
            yield from change_basis(shard, state, options, found.own)
        return (yield from descend(shard, state, options, found.projected, basis))  # N = rho(R)


def galore_state(shard: MatrixShard, options: GaLoreOptions, rank: int) -> StateSpec:
    """A basis, the moments of the inner optimizer, and with ``cos_threshold`` when the next basis is due."""
    return {**subspace_state(shard, options, rank), **options.lazy_state}


def basis_due(shard: MatrixShard, state: State, options: GaLoreOptions) -> bool:
    """Whether a new basis is due; the same for all matrices of a stack."""
    if options.is_lazy:
        return bool(state["step"] >= state["next_refresh"])
    return refresh_due(shard.names[0], options, state["step"])


def refresh_due(name: str, options: GaLoreOptions, step: int) -> bool:
    """Whether a new basis is due: in steps 0, T, 2T, ...

    If refreshes are staggered, all but the first are shifted by an offset that is a function of the matrix's name.
    """
    offset = name_hash("stagger", name) % options.update_proj_gap if options.stagger else 0
    return step == 0 or (step + offset) % options.update_proj_gap == 0


def new_basis(shard: MatrixShard, options: GaLoreOptions, step: int) -> Program[torch.Tensor]:
    """An orthonormal basis of the gradient's leading subspace: matrices x owned compressed rows x rank, fp32."""
    if step == 0 and options.first_basis == "random":
        return (yield from first_random_basis(shard, options))
    rank = min(options.rank, *shard.shape)
    if options.projector == "svd":
        return (yield from singular_basis(shard, rank))
    return (yield from randomized_range(shard, rank, options.seed, step))


def first_random_basis(shard: MatrixShard, options: GaLoreOptions) -> Program[torch.Tensor]:
    """A random orthonormal basis for the first step: matrices x owned compressed rows x rank, fp32."""
    return random_basis(shard, min(options.rank, *shard.shape), options.seed, 0)


def change_basis(shard: MatrixShard, state: State, options: GaLoreOptions, new: torch.Tensor) -> Program[None]:
    """Store a new basis and, if asked, decide how long it lasts and rotate the moments into it.

    Args:
        shard: the stack.
        state: with the old basis.
        options: with ``cos_threshold`` and ``moments``.
        new: matrices x owned compressed rows x rank, fp32.
    """
    rotates, rotation = options.moments == "rotate" and state["step"] > 0, None
    if options.is_lazy:
        rotation = yield from note_similarity(shard, state, options, new)
    elif rotates:
        rotation = yield from shard.replicated_sum(state["basis"].mT @ new)  # Q_old^T Q
    if rotates and rotation is not None:
        options.inner_optimizer.rotate(state, rotation)
    state["basis"] = new
