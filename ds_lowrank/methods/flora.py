"""Flora (Hao et al., arXiv 2402.03293): momentum in a random subspace that changes, on Adafactor.

With the compressed dimension second, ``H`` is kept x compressed:

    every kappa steps    P_new <- from N(0, 1/r), compressed x r;  M <- M P_old^T P_new
    v_row, v_col <- averages of the means of H * H + eps1 over columns and over rows, b = 1 - t^-0.8
    U <- H / sqrt(v_row v_col^T / mean(v_row)),  U <- U / max(1, rms(U))      (Adafactor, arXiv 1804.04235)
    D <- beta1 M P^T + (1 - beta1) U
    M <- beta1 M + (1 - beta1) U P
    W <- W - lr * max(eps2, rms(W)) * D

``P`` is a function of (seed, name, number of the interval) and never stored. The newest term of ``D`` may also be
``U P P^T``, so that ``D = M P^T`` with the new ``M``; and ``U`` may be ``H``, without a second moment. With both, a
step needs of ``H`` no more than ``H P``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.linalg.moments import rotate_first
from ds_lowrank.linalg.sketch import normal
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.factored_moment import factored_spec, normalised, unchanged
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import ProjectedGradient
from ds_lowrank.methods.blocks.range_finder import held_sketch
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.methods.blocks.weight_size import size_of, weight_squares
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.elementwise import along, largest_magnitudes
from ds_lowrank.sharding.matrix import MatrixShard, Sums
from ds_lowrank.sharding.reduce import Program, without_rounds
from ds_lowrank.sharding.updates import Dense, Factors, Update


class FloraOptions(Options):
    """The keys of Flora."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*Options.fixed_on_resume, "rank", "kappa", "second_moment", "seed")

    rank: int = Field(256, gt=0, strict=True)
    """Columns of ``P``, r; at most the smaller dimension of a matrix."""
    kappa: int = Field(1000, gt=0, strict=True)
    """How many optimizer steps a projection lasts."""
    second_moment: Literal["factored", "none"] = "factored"
    """Adafactor's, of the whole gradient in two factors; or none: momentum alone."""
    newest_term: Literal["exact", "projected"] = "exact"
    """This step's term of the direction: ``U`` itself, as in the official code, or ``U P P^T``, as all earlier ones."""
    scale_parameter: bool = Field(True, strict=True)
    """Whether a matrix's step is multiplied by the root mean square of its weights, as in Adafactor."""


@dataclass
class FloraProjection(ProjectedGradient):
    """What was found of the gradients: without a second moment ``H P``, else only their magnitudes.

    Attributes:
        projection: ``P``: matrices x held compressed rows x r, fp32.
    """

    projection: torch.Tensor = field(kw_only=True)


class FloraMethod(Method):
    """Flora on the matrices of a stack."""

    name: ClassVar[str] = "Flora"
    Options: ClassVar[type[FloraOptions]] = FloraOptions

    @staticmethod
    def state(shard: MatrixShard, options: FloraOptions, rank: int) -> StateSpec:
        """``M``, kept x r, and with a second moment one number for each row and each column."""
        momentum = {"exp_avg": options.first_moment_spec(shard.kept, rank)}
        if options.second_moment == "none":
            return momentum
        return {**momentum, **factored_spec(shard)}

    @staticmethod
    def needs_gradient(options: FloraOptions) -> str | None:
        """A step needs ``H P`` only if it is linear in the gradient and its newest term is projected too."""
        if options.second_moment == "none" and options.newest_term == "projected":
            return None
        return (
            "its second moment and the newest term of its direction are of the whole gradient: set second_moment to "
            "'none' and newest_term to 'projected', or reduction to 'gradient'"
        )

    @staticmethod
    @without_rounds
    def factors(shard: MatrixShard, state: State, options: FloraOptions) -> Sums:
        """``P`` of the next step."""
        return (held_projection(shard, options, state["step"]),)

    @staticmethod
    def project(shard: MatrixShard, state: State, options: FloraOptions) -> Program[FloraProjection]:
        """``H P``; with a second moment there is nothing to find before that is known."""
        projection, due = held_projection(shard, options, state["step"]), state["step"] % options.kappa == 0
        if options.second_moment == "factored":
            return FloraProjection(largest_magnitudes(shard), due, projection=projection)
        projected = yield shard.kept.reduce_scatter(shard.times(projection))
        return FloraProjection(projected, due, projection=projection)

    @staticmethod
    def update(shard: MatrixShard, state: State, options: FloraOptions, found: FloraProjection) -> Program[Update]:
        """Update the moments; the direction ``D``, times the size of the weights."""
        if found.due and state["step"] > 0:
            reproject(shard, state, options)
        if options.second_moment == "factored":
            newest = yield from normalised(shard, state, found, found.projection)  # U
        else:
            newest = unchanged(shard, found.projected)
        beta1, is_exact, before = options.betas[0], options.newest_term == "exact", state["exp_avg"]
        state["exp_avg"] = before.lerp(newest.projected, 1 - beta1)  # M <- beta1 M + (1 - beta1) U P
        unmeasured = torch.zeros(len(shard), 1, 1, dtype=torch.float32, device=shard.device)
        momentum, squares = yield (
            shard.kept.all_gather(before if is_exact else state["exp_avg"]),
            shard.all_reduce(weight_squares(shard) if options.scale_parameter else unmeasured),
        )
        size = size_of(shard, squares) if options.scale_parameter else torch.ones_like(squares)
        if not is_exact:
            return Factors(size * momentum, found.projection, 1.0)  # D = M P^T
        factors, a = Factors(beta1 * size * momentum, found.projection, 1.0), (1 - beta1) * size * newest.a

        def direction(piece: Piece) -> torch.Tensor:
            """``beta1 M P^T + (1 - beta1) diag(a) H diag(b)``."""
            gradient = shard.gradient.values_at(piece).float() * along(shard, shard.kept, piece, a)
            return factors.lifted(shard, piece).addcmul_(gradient, along(shard, shard.compressed, piece, newest.b))

        return Dense(direction, 1.0)


def held_projection(shard: MatrixShard, options: FloraOptions, step: int) -> torch.Tensor:
    """The rows of ``P`` that this rank computes with: matrices x held compressed rows x r, fp32."""
    rank = min(options.rank, *shard.shape)
    return held_sketch(shard, rank, options.seed, step // options.kappa) / sqrt(rank)


def reproject(shard: MatrixShard, state: State, options: FloraOptions) -> None:
    """Carry the momentum into the new subspace: ``M <- M P_old^T P_new``.

    Args:
        shard: the stack.
        state: with ``M``, and the number of steps so far, at which a new interval begins.
        options: of the matrices' group.
    """
    rank, number = min(options.rank, *shard.shape), state["step"] // options.kappa
    rows = (0, shard.compressed.size if shard.part.numel else 0)  # a rank without elements needs none
    old, new = (normal(options.seed, shard.names, n, rows, (0, rank), shard.device) for n in (number - 1, number))
    rotate_first(state["exp_avg"], old.mT @ new / rank)
