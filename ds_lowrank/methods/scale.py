"""SCALE (Glentis et al., arXiv 2506.16659, Algorithm 1): the gradient, each output unit brought to one length.

With the dimension over which lengths are taken second, ``H`` is kept x compressed:

    M   <- mu M + (1 - mu) H             mu = 0, as published for all but the last layer: M = H, and nothing is stored
    N_i <- M_i / max(rms(M_i), eps)      for each kept row i; ``length``: M_i / max(|M_i|, eps)
    W   <- W - lr * scale * N

The paper writes weights input x output and divides their columns. PyTorch stores them output x input: the same units
are rows here, and these are kept by ``proj_type`` ``right``, the default.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.methods.blocks.projection import SMALLEST_SCALE, ProjectedGradient
from ds_lowrank.methods.blocks.state_spec import State, StateSpec
from ds_lowrank.sharding.elements import Elements, Piece
from ds_lowrank.sharding.elementwise import along, largest_magnitudes, squared_norms
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program
from ds_lowrank.sharding.updates import Dense, ScaledGradient, Update


class ScaleOptions(Options):
    """The keys of SCALE."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*Options.fixed_on_resume, "momentum")

    proj_type: Literal["std", "reverse_std", "left", "right"] = "right"
    """Over which dimension lengths are taken: ``right`` for those of output units, ``left`` for those of input units;
    ``std`` takes them over the smaller dimension, ``reverse_std`` over the larger."""
    scale: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the update of a projected matrix, not its weight decay."""
    normalization: Literal["rms", "length"] = "rms"
    """Whether a unit's root mean square becomes one, as in the official code, or its length, as in the paper."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """mu. Above 0, a momentum of the size of each matrix is stored."""


class ScaleMethod(Method):
    """SCALE on the matrices of a stack."""

    name: ClassVar[str] = "Scale"
    Options: ClassVar[type[ScaleOptions]] = ScaleOptions

    @staticmethod
    def state(shard: MatrixShard, options: ScaleOptions, rank: int) -> StateSpec:
        """Nothing; with a ``momentum``, M: a number for each element."""
        return {"momentum": options.first_moment_spec(shard.elements, 1)} if options.momentum else {}

    @staticmethod
    def needs_gradient(options: ScaleOptions) -> str:
        """A step scales the gradient itself."""
        return "it scales the gradient itself, which every rank needs whole: set reduction to 'gradient'"

    @staticmethod
    def project(shard: MatrixShard, state: State, options: ScaleOptions) -> Program[ProjectedGradient]:
        """Nothing is projected: only how large the gradient is has to be known before the step is decided."""
        yield from ()
        return ProjectedGradient(largest_magnitudes(shard), due=False)

    @staticmethod
    def update(shard: MatrixShard, state: State, options: ScaleOptions, found: ProjectedGradient) -> Program[Update]:
        """The update ``scale * N``."""
        if not options.momentum:
            sizes = yield from sizes_of_units(shard, options, shard.gradient, found.safe_scale, found.are_ordinary)
            return ScaledGradient(1 / sizes, [options.scale / each for each in found.host_safe_scales])
        momentum = yield from momentum_of(shard, state, options)
        largest: torch.Tensor = yield shard.all_reduce(largest_magnitudes(shard, momentum))
        largest = largest.clamp_min(SMALLEST_SCALE)
        sizes = yield from sizes_of_units(shard, options, momentum, largest)

        def update(piece: Piece) -> torch.Tensor:
            values = momentum.values_at(piece) / largest[piece.matrices]
            return values.div_(along(shard, shard.kept, piece, sizes))

        return Dense(update, options.scale)


def momentum_of(shard: MatrixShard, state: State, options: ScaleOptions) -> Program[Elements]:
    """``M <- mu M + (1 - mu) H``: this rank's elements of the new momentum, fp32.

    Nothing is exchanged, except if the momentum is quantized in blocks and two ranks share a block.

    Args:
        shard: the stack, with this step's gradients.
        state: with ``momentum``: matrices x owned elements x 1, fp32, which is updated.
        options: with ``momentum``, mu.
    """
    new, own = 1 - options.momentum, state["momentum"]
    sizes, rectangles = [len(shard)], shard.part.rectangles
    if shard.geometry.block_rows == 1:
        momentum = Elements([own.squeeze(2)], sizes, rectangles)
        for piece in shard.gradient.dense_pieces:
            momentum.values_at(piece).lerp_(piece.values.float(), new)
        return momentum
    held = torch.empty(len(shard), shard.part.numel, 1, dtype=torch.float32, device=shard.device)
    gradient = Elements([held.squeeze(2)], sizes, rectangles)
    for piece in shard.gradient.dense_pieces:
        gradient.values_at(piece).copy_(piece.values)
    own.lerp_((yield shard.elements.reduce_scatter(held)), new)
    return Elements([(yield shard.elements.all_gather(own)).squeeze(2)], sizes, rectangles)


def sizes_of_units(
    shard: MatrixShard, options: ScaleOptions, elements: Elements, safe_scale: torch.Tensor, are_ordinary: bool = False
) -> Program[torch.Tensor]:
    """``max(rms(M_i), eps)``, or with the length: what each kept row is divided by, over the safe scale.

    Args:
        shard: the stack.
        options: with ``normalization`` and ``eps``.
        elements: of M, any floating dtype.
        safe_scale: of M: matrices x 1 x 1, fp32.
        are_ordinary: whether squares of M stay in the range of fp32.

    Returns:
        matrices x held kept rows x 1, fp32, above zero.
    """
    squares = yield shard.kept.reduce_scatter(squared_norms(shard, shard.kept, elements, safe_scale, are_ordinary))
    count = shard.compressed.size if options.normalization == "rms" else 1
    sizes: torch.Tensor = yield shard.kept.all_gather((squares / count).sqrt())
    return torch.maximum(sizes, options.eps / safe_scale).clamp_min_(torch.finfo(torch.float32).tiny)
