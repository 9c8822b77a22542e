"""How DeepSpeed and megatron-core would split parameters over ranks that do not exist.

It is what :mod:`ds_lowrank.placement.zero` and :mod:`ds_lowrank.placement.tensor_parallel` read from an engine, worked
out beforehand: for estimates and for counting what a large world sends. Tests compare it with real engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from ds_lowrank.placement.grid import Grid
from ds_lowrank.sharding.layout import Range

ALIGNMENT = 2
"""DeepSpeed pads a flat buffer to a multiple of this many elements per data-parallel rank."""


@dataclass(frozen=True)
class SimulatedGrid(Grid):
    """A tensor-parallel group without processes, as one of its ranks sees it.

    Attributes:
        number: this rank's index in the group.
        size: how many ranks the group has.
    """

    number: int = 0
    size: int = 1

    @property
    def tensor_rank(self) -> int:
        """This rank's number among the tensor-parallel ranks."""
        return self.number

    @property
    def tensor_size(self) -> int:
        """How many tensor-parallel ranks there are."""
        return self.size


def shard(parameter: torch.nn.Parameter, dim: int, ranks: int) -> torch.nn.Parameter:
    """One tensor-parallel rank's share of a parameter, with the marks of megatron-core.

    Args:
        parameter: the whole one, on the meta device.
        dim: the dimension that is split evenly.
        ranks: over how many ranks.
    """
    shape = [size // ranks if axis == dim else size for axis, size in enumerate(parameter.shape)]
    split = torch.nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
    marks = {"tensor_model_parallel": ranks > 1, "partition_dim": dim, "partition_stride": 1}
    for mark, value in marks.items():
        setattr(split, mark, value)
    return split


def intervals(numels: Sequence[int], data: int, zero: int, round_robin: bool = False) -> list[list[Range]]:
    """For every data-parallel rank the elements ``[start, end)`` that it steps of each parameter.

    ZeRO 1 and 2 cut the flat buffer of all parameters evenly, ZeRO 3 every parameter; at ZeRO 0 every rank steps all.

    Args:
        numels: of every parameter of a group, in the optimizer's order.
        data: the number of data-parallel ranks.
        zero: the stage.
        round_robin: whether ``round_robin_gradients`` has dealt the parameters over the flat buffer.
    """
    if zero == 0:
        return [[(0, numel) for numel in numels] for _ in range(data)]
    if zero == 3:
        shares = [-(-numel // data) for numel in numels]
        return [
            [(min(r * share, n), min((r + 1) * share, n)) for n, share in zip(numels, shares, strict=True)]
            for r in range(data)
        ]
    share = flat_share(numels, data)
    count = len(numels)
    order = [i for first in range(data) for i in range(first, count, data)] if round_robin else list(range(count))
    starts = dict(zip(order, [0, *accumulate(numels[i] for i in order)], strict=False))
    return [
        [_overlap((r * share, (r + 1) * share), starts[i], numel) for i, numel in enumerate(numels)]
        for r in range(data)
    ]


def flat_share(numels: Sequence[int], data: int) -> int:
    """Elements of a data-parallel rank's share of a flat buffer, padding included.

    Args:
        numels: of every parameter in the buffer.
        data: the number of data-parallel ranks.
    """
    return math.ceil(sum(numels) / (ALIGNMENT * data)) * ALIGNMENT


def _overlap(share: Range, start: int, numel: int) -> Range:
    low, high = max(share[0], start), min(share[1], start + numel)
    return (low - start, high - start) if low < high else (0, 0)
