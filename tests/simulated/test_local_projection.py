"""``tensor_parallel_projection: local``: every tensor-parallel rank's shard is stepped as a matrix of its own."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.optimizer.build_slots import _parts
from ds_lowrank.placement.tensor_parallel import logical_matrices
from ds_lowrank.reference import DENSE
from tests.methods import of
from tests.rows.vlorp import VLORP
from tests.simulated.harness import ROUNDING, ShardedMatrix, grid_order
from tests.simulated.tensor_parallel import (
    CASES,
    COMMON,
    SPLITS,
    FakeGrid,
    cuts_inside_rows,
    intervals_of,
    megatron_parameter,
)

LOCAL_CASES = [*CASES, ("VLoRP", VLORP | {"granularity": 3, "left_view": "official", "proj_type": "left"})]


@pytest.mark.parametrize(("method", "options"), LOCAL_CASES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 3), (4, 2)])
def test_local_projection_steps_each_shard_as_a_matrix_of_its_own(tensor, data, split, method, options):
    shape, options = (12, 24) if split == "rows" else (24, 12), COMMON | options
    torch.manual_seed(0)
    starts = [torch.randn(shape) if method == "GradNormLoRP" else torch.zeros(shape) for _ in range(tensor)]
    shards = local_shards(tensor, data, split, method, starts, **options)
    dense = [DENSE[method](start.clone(), name=f"w@tensor{t}", **options) for t, start in enumerate(starts)]
    for step in range(4):
        for t, (one, shard) in enumerate(zip(dense, shards, strict=True)):
            gradient = shard_gradients(method, shape, t)(step)
            one.step(gradient)
            shard.step(gradient)
    for shard, one in zip(shards, dense, strict=True):
        assert (shard.weight - one.weight).norm() < ROUNDING * one.weight.norm()


def local_shards(tensor, data, split, method, starts, **options):
    """Every tensor-parallel rank's shard of a matrix, cut over its data-parallel ranks."""
    shape, dim = tuple(starts[0].shape), SPLITS.index(split)
    intervals = intervals_of([shape[0] * shape[1]], [cuts_inside_rows(shape[0] * shape[1], data)], grid_order(1, data))
    shards = []
    for own, start in enumerate(starts):
        (logical,) = logical_matrices(megatron_parameter(shape, dim), shape, "w", FakeGrid(own, tensor))
        local = logical.as_local()
        assert (local.name, local.shape, local.placement) == (f"w@tensor{own}", shape, "local")
        parts, peers = _parts(local, [own] * data, intervals)
        shards.append(ShardedMatrix(method, start.clone(), parts, name=local.name, peers=peers, **options))
    return shards


def shard_gradients(method, shape, seed):
    choose = of(method).gradients
    if choose is not None:
        return lambda step: choose(shape)(100 * seed + step)
    return lambda step: torch.randn(shape, generator=torch.Generator().manual_seed(1 + 100 * seed + step))
