"""Finding a basis for a gradient whose elements are spread over ranks: of its leading subspace, or a random one."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from ds_lowrank.linalg.orthonormal import leading_singular_vectors, orthonormal
from ds_lowrank.linalg.sketch import normal
from ds_lowrank.methods.blocks.basis_options import BasisOptions
from ds_lowrank.sharding.axis import Axis
from ds_lowrank.sharding.elementwise import blocks
from ds_lowrank.sharding.layout import Range
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program


class RangeFinderOptions(BasisOptions):
    """The key of the methods that use :func:`randomized_range`, some of them by the name of a ``projector``."""

    power_steps: int = Field(1, ge=0, le=3, strict=True)
    """Power steps of the randomized range finder, q: each multiplies the sketch by ``H^T H`` once more."""

    def model_post_init(self, context: Any) -> None:
        """Refuse the key beside another projector.

        Raises:
            ValueError: ``power_steps`` is set, and ``projector`` is not ``randomized``.
        """
        super().model_post_init(context)
        projector = getattr(self, "projector", "randomized")
        if self.power_steps != 1 and projector != "randomized":
            raise ValueError(
                f"power_steps belongs to projector 'randomized', projector is {projector!r}: remove one of them"
            )


def singular_basis(shard: MatrixShard, rank: int, waits: torch.Tensor | None = None) -> Program[torch.Tensor]:
    """The gradient's leading singular vectors, by an exact SVD of the whole gradient on each matrix's root.

    Args:
        shard: the stack, with this step's gradient attached.
        rank: how many vectors.
        waits: to sample vectors instead of taking the leading ones, as :func:`leading_singular_vectors` does.

    Returns:
        matrices x owned compressed rows x rank of the basis, fp32.
    """
    gradient, side = (yield shard.rows.reduce_to_root(blocks(shard, shard.rows))), shard.side
    if shard.transposed:  # an SVD of the transpose would have other signs
        gradient, side = gradient.mT.contiguous(), "left" if side == "right" else "right"
    own: torch.Tensor = yield shard.compressed.scatter_from_root(leading_singular_vectors(gradient, rank, side, waits))
    return own


def sampled_basis(shard: MatrixShard, rank: int, seed: int, counter: int) -> Program[torch.Tensor]:
    """Singular vectors of the gradient, drawn without replacement with probabilities proportional to singular values.

    The draw is a function of (seed, name, counter). Half the sum of the squares of two normal numbers is exponentially
    distributed: these are the waits.

    Args:
        shard: the stack, with this step's gradient attached.
        rank: how many vectors.
        seed: the run's seed.
        counter: the step, so that every refresh draws anew.

    Returns:
        matrices x owned compressed rows x rank of the basis, fp32, by descending singular values.
    """
    rooted = [shard.names[i] for i in shard.rooted]
    numbers = normal(seed, rooted, f"sample {counter}", (0, min(shard.shape)), (0, 2), shard.device)
    return (yield from singular_basis(shard, rank, numbers.square().sum(2) / 2))


def random_basis(shard: MatrixShard, rank: int, seed: int, counter: int) -> Program[torch.Tensor]:
    """A random orthonormal basis, a function of (seed, name, counter).

    Args:
        shard: the stack. Where backward has projected gradients, it holds the basis that they were projected onto.
        rank: how many columns the basis has.
        seed: the run's seed.
        counter: the step, so that every refresh draws anew.

    Returns:
        matrices x owned compressed rows x rank of the basis, fp32.
    """
    if shard.is_accumulated and shard.held_basis is not None:
        return shard.compressed.own_of_held(shard.held_basis)
    rooted = [shard.names[i] for i in shard.rooted]
    drawn = orthonormal(normal(seed, rooted, counter, (0, shard.compressed.size), (0, rank), shard.device))
    own: torch.Tensor = yield shard.compressed.scatter_from_root(drawn)
    return own


def randomized_range(
    shard: MatrixShard, rank: int, seed: int, counter: int, power_steps: int = 1
) -> Program[torch.Tensor]:
    """A basis of the gradient's leading subspace, by a randomized range finder: the range of ``(H^T H)^q sketch``.

    This is Algorithm 4.4 of Halko et al., arXiv 0909.4061. Every product is orthonormalised: directions ``k`` times
    weaker than the strongest are then found to ``k`` rounding errors instead of ``k^2``, however the sums are split
    over ranks. Without a power step it is the range of ``H^T sketch``, with a sketch of the kept dimension.

    Args:
        shard: the stack, with this step's gradient attached.
        rank: how many columns the basis has.
        seed: the run's seed.
        counter: the step, so that every refresh draws a new sketch.
        power_steps: q.

    Returns:
        matrices x owned compressed rows x rank of the basis, fp32, orthonormal over all ranks.
    """
    if power_steps == 0:
        of_kept = normal(seed, shard.names, counter, shard.kept.held, (0, rank), shard.device)
        return (yield from _orthonormal(shard.compressed, shard.transposed_times(of_kept)))
    own = yield from _power_step(shard, held_sketch(shard, rank, seed, counter))
    for _ in range(power_steps - 1):
        wide = yield shard.compressed.all_gather(own)
        own = yield from _power_step(shard, wide)
    return own


def _power_step(shard: MatrixShard, wide: torch.Tensor) -> Program[torch.Tensor]:
    """An orthonormal basis of the range of ``H^T H wide``: matrices x owned compressed rows x rank, fp32."""
    tall = yield from _orthonormal(shard.kept, shard.times(wide))
    tall = yield shard.kept.all_gather(tall)
    return (yield from _orthonormal(shard.compressed, shard.transposed_times(tall)))


def _orthonormal(axis: Axis, of_ranks: torch.Tensor) -> Program[torch.Tensor]:
    """Sum over ranks and orthonormalise on each matrix's root: matrices x owned rows x rank, fp32."""
    summed = yield axis.reduce_scatter(of_ranks)
    collected = yield axis.gather_to_root(summed)
    own: torch.Tensor = yield axis.scatter_from_root(orthonormal(collected))
    return own


def leading_basis(
    shard: MatrixShard, rank: int, projector: str, seed: int, counter: int, power_steps: int = 1
) -> Program[torch.Tensor]:
    """A basis of the gradient's leading subspace, as ``projector`` says: ``svd``, exact, or by the range finder.

    The other arguments and the result are those of :func:`randomized_range`.
    """
    if projector == "svd":
        return (yield from singular_basis(shard, rank))
    return (yield from randomized_range(shard, rank, seed, counter, power_steps))


def held_sketch(shard: MatrixShard, rank: int, seed: int, counter: int, rows: Range | None = None) -> torch.Tensor:
    """The rows of random normal matrices, compressed x rank, that this rank multiplies its elements by.

    Args:
        shard: the stack.
        rank: how many columns a sketch has.
        seed: the run's seed.
        counter: distinguishes the sketches of one matrix; a step, for example.
        rows: which compressed rows; None for those that this rank holds.

    Returns:
        matrices x held compressed rows x rank, fp32.
    """
    return normal(seed, shard.names, counter, rows or shard.compressed.held, (0, rank), shard.device)


def with_lost_columns(
    shard: MatrixShard,
    basis: torch.Tensor,
    lengths: torch.Tensor,
    seed: int,
    counter: int,
    rows: Range | None = None,
) -> torch.Tensor:
    """A basis with random numbers in the place of its columns of zeros.

    A gradient with fewer than r directions leaves a basis with columns of zeros. What an iteration makes of a basis
    would keep them for ever; from random numbers it finds the directions that later gradients have.

    Args:
        shard: the stack.
        basis: matrices x held compressed rows x rank, fp32.
        lengths: about the squared lengths of its columns over all ranks, zero for those of zeros: matrices x 1 x rank.
        seed: the run's seed.
        counter: the step.
        rows: which compressed rows of the basis are given; None for those that this rank holds.
    """
    return torch.where(lengths == 0, held_sketch(shard, basis.shape[2], seed, counter, rows), basis)
