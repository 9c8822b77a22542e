"""A model's parameters on grids of simulated ranks, cut in every way, with the marks of their layers."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from ds_lowrank.placement.marks import AUTOTP
from ds_lowrank.placement.parameter_names import TAG, Tag, tag_fused
from ds_lowrank.placement.stacks import tag_stack


@dataclass(frozen=True)
class Weight:
    """A parameter of the model without parallelism.

    Attributes:
        name: of it.
        shape: of it.
        dim: the dimension that tensor parallelism splits; None for none.
        form: ``plain``, ``fused`` or ``stack``.
        kind: as in :class:`Tag`.
        stage: of two pipeline stages, the one that has it; None for both.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    form: str = "plain"
    kind: str = "weight"
    stage: int | None = 0


HEIGHTS = {"q": 12, "k": 6, "v": 6}
WEIGHTS = (
    Weight("embed.weight", (132, 24), 0, kind="embedding", stage=None),
    Weight("first.norm.weight", (36,)),
    Weight("first.up.weight", (144, 36), 0),
    Weight("first.up.bias", (144,), 0),
    Weight("first.down.weight", (36, 144), 1),
    Weight("first.qkv.weight", (96, 36), 0, "fused"),
    Weight("second.square.weight", (72, 72), stage=1),
    Weight("second.experts.weight", (4, 24, 36), 1, "stack", stage=1),
    Weight("second.experts.back", (4, 36, 24), 0, "stack", stage=1),
    Weight("second.left_out.weight", (36, 144), 1, stage=1),
    Weight("second.kept.weight", (66, 30), stage=1),
    Weight("second.scalar", (), stage=1),
    Weight("second.kernel", (6, 4, 5), stage=1),
)
"""Every kind of cut: along rows and columns, in several strips, in stacks, not at all. The scales of 8-bit moments are
for 64 rows, of which several have more. What is ``left_out`` is stepped by AdamW, like whatever is not a matrix."""


@dataclass(frozen=True)
class World:
    """A grid of simulated ranks.

    Attributes:
        data: how many ranks split a shard.
        tensor: over how many ranks weights are split.
        pipeline: one or two stages.
        cut: ``whole`` if every data-parallel rank steps all of its shard; ``zero`` if they have cut it; ``projected``
            if all have it whole, and share the states of what is projected.
        layers: ``megatron`` for equal shards, ``autotp`` for unequal ones where possible.
        seed: of the places of the cuts.
    """

    data: int
    tensor: int = 1
    pipeline: int = 1
    cut: str = "zero"
    layers: str = "megatron"
    seed: int = 0

    @property
    def size(self) -> int:
        return self.data * self.tensor * self.pipeline

    def ranks(self):
        """The stage, the data rank and the tensor rank of every rank."""
        return itertools.product(range(self.pipeline), range(self.data), range(self.tensor))

    def sizes(self, weight):
        """Every tensor rank's size along the dimension in which a weight is split; None if it is not."""
        if weight.dim is None or self.tensor == 1:
            return None
        size = weight.shape[weight.dim]
        if self.layers == "megatron" or weight.form == "fused" or (weight.form, weight.dim) == ("stack", 0):
            return [size // self.tensor] * self.tensor
        draw = random.Random(f"{self.seed} {weight.name}")
        weights = [draw.randint(1, 4) for _ in range(self.tensor)]
        ends = [0, *(size * end // sum(weights) for end in itertools.accumulate(weights))]
        return [b - a for a, b in itertools.pairwise(ends)]


def held_elements(weight, world, data, tensor) -> tuple[int, int]:
    """The elements that a rank steps of a parameter."""
    sizes, numel = world.sizes(weight), math.prod(weight.shape)
    if sizes is not None:
        numel = numel // weight.shape[weight.dim] * sizes[tensor]
    if world.cut != "zero":
        return 0, numel
    draw = random.Random(f"{world.seed} {weight.name} {tensor}")
    bounds = [0, *sorted(draw.randint(0, numel) for _ in range(world.data - 1)), numel]
    return bounds[data], bounds[data + 1]


def parameter_on(weight, world, tensor) -> torch.nn.Parameter:
    """A parameter as it is on a tensor-parallel rank, with the marks of its layer."""
    shape, sizes = list(weight.shape), world.sizes(weight)
    if sizes is not None:
        shape[weight.dim] = sizes[tensor]
    parameter: Any = torch.nn.Parameter(torch.empty(shape))
    setattr(parameter, TAG, Tag(weight.name, weight.kind))
    if weight.form == "fused":
        tag_fused(parameter, HEIGHTS)
    if weight.form == "stack":
        tag_stack(parameter)
    if sizes is not None and world.layers == "autotp":
        meta = {"partition_dim": weight.dim, "partition_sizes": sizes, "replicated": False, "sub_param_sizes": None}
        setattr(parameter, AUTOTP, meta)
    elif sizes is not None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, weight.dim, 1
    return parameter
