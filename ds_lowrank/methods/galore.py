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
from ds_lowrank.methods.blocks.dct_basis import gather_indices
from ds_lowrank.methods.blocks.lazy_refresh import LazyRefreshOptions, note_similarity
from ds_lowrank.methods.blocks.range_finder import (
    RangeFinderOptions,
    leading_basis,
    random_basis,
    sampled_basis,
)
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.subspace import (
    BasisPlacement,
    Projection,
    basis_factors,
    basis_of_step,
    descend,
    project_on,
    project_on_columns,
    stored_basis,
    subspace_state,
)
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, Factors


class GaLoreOptions(LazyRefreshOptions, RangeFinderOptions):
    """The keys of GaLore, in its own spelling."""

    projector: Literal["randomized", "svd", "random", "sampled", "dct"] = "randomized"
    """Which basis: of the leading subspace, by a randomized range finder or by an exact SVD on one rank; a random one
    (GoLore); a sample of the singular vectors (I3S); or the strongest columns of the DCT matrix (DCT-AdamW)."""
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
        """Refuse to rotate moments that the inner optimizer does not have, and keys of another projector."""
        super().model_post_init(context)
        if self.first_basis == "random" and self.projector == "dct":
            raise ValueError("projector 'dct' has no random basis to begin with: set first_basis to 'gradient'")
        if self.projector == "dct" and self.basis_dtype != "fp32":
            raise ValueError("projector 'dct' stores indices and no numbers of a basis: set basis_dtype to 'fp32'")
        if self.is_lazy and self.projector not in ("randomized", "svd"):
            raise ValueError(
                f"cos_threshold compares leading subspaces, projector is {self.projector!r}: set that to 'randomized' "
                "or 'svd', or remove cos_threshold"
            )
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
        """The basis, compressed x rank, or its indices, rank x 1, and the inner optimizer's moments, kept x rank."""
        return galore_state(shard, options, rank)

    @staticmethod
    def needs_gradient(options: GaLoreOptions) -> None:
        """An ordinary step needs ``R = H Q`` only."""

    @staticmethod
    def factors(shard: MatrixShard, state: State, options: GaLoreOptions) -> Program[Sums | None]:
        """``Q``; None if a new one is due that is found in the gradient."""
        step = state["step"]
        if not basis_due(shard, state, options):
            return (yield from basis_factors(shard, state, options))
        if not draws_basis(options, step):
            return None
        own = yield from random_basis(shard, min(options.rank, *shard.shape), options.seed, step)
        shard.held_basis, shard.is_basis_new = (yield shard.compressed.all_gather(own)), True
        return (shard.held_basis,)

    @staticmethod
    def project(shard: MatrixShard, state: State, options: GaLoreOptions) -> Program[Projection]:
        """Find the basis if it is due, and project: ``R = H Q``."""
        step, rank = state["step"], min(options.rank, *shard.shape)
        due = basis_due(shard, state, options)
        if due and options.projector == "dct":
            return (yield from project_on_columns(shard, rank))
        own = (yield from new_basis(shard, options, step)) if due else stored_basis(state)
        found = yield from project_on(shard, own, due, options)  # R = H Q
        found.is_drawn = draws_basis(options, step)
        return found

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


def draws_basis(options: GaLoreOptions, step: int) -> bool:
    """Whether a basis that is due in a step is random, and needs no gradient."""
    return options.projector == "random" or (step == 0 and options.first_basis == "random")


def new_basis(shard: MatrixShard, options: GaLoreOptions, step: int) -> Program[torch.Tensor]:
    """An orthonormal basis, of the gradient or random: matrices x owned compressed rows x rank, fp32."""
    rank = min(options.rank, *shard.shape)
    if draws_basis(options, step):
        return (yield from random_basis(shard, rank, options.seed, step))
    if options.projector == "sampled":
        return (yield from sampled_basis(shard, rank, options.seed, step))
    return (yield from leading_basis(shard, rank, options.projector, options.seed, step, options.power_steps))


def change_basis(shard: MatrixShard, state: State, options: GaLoreOptions, new: torch.Tensor) -> Program[None]:
    """Store a new basis and, if asked, decide how long it lasts and rotate the moments into it.

    Args:
        shard: the stack.
        state: with the old basis.
        options: with ``cos_threshold`` and ``moments``.
        new: what this rank stores of the new basis, as the state has it of the old one.
    """
    rotates, rotation = options.moments == "rotate" and state["step"] > 0, None
    if options.is_lazy:
        rotation = yield from note_similarity(shard, state, options, new)
    elif rotates and options.stores_indices:  # of columns of one orthonormal matrix
        pairs = torch.cat([state["indices"], new], dim=2)
        old_and_new = yield from gather_indices(shard, pairs, min(options.rank, *shard.shape))
        rotation = (old_and_new[..., :1] == old_and_new[..., 1:].mT).float()
    elif rotates:
        rotation = yield from shard.replicated_sum(state["basis"].mT @ new)  # Q_old^T Q
    if rotates and rotation is not None:
        options.inner_optimizer.rotate(state, rotation)
    state["indices" if options.stores_indices else "basis"] = new
