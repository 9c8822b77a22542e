"""LORENZA's directions: every layout draws the same ones, on its parts and on whole blocks, as the dense reference."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.reference.lorenza import DenseLorenza
from ds_lowrank.sharding.layout import Block, ContiguousPart
from ds_lowrank.sharding.matrix import MatrixShard
from tests.simulated.harness import (
    ShardedMatrix,
    directions_on,
    even_parts,
    grid_order,
    grid_parts,
    tensor_blocks,
)
from tests.simulated.tensor_parallel import SPLITS, cuts_inside_rows

FORMS = [{"rank": 3}, {"rank": 3, "probe_form": "gaussian"}, {"rank": 3, "proj_type": "reverse_std"}, {"rank": None}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(17, 9), (9, 17)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_layout_draws_the_same_directions_on_parts_and_on_the_whole(ranks, shape, form):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    twin = DenseLorenza(torch.zeros(shape), **form)
    sharded = ShardedMatrix("Lorenza", torch.zeros(shape), even_parts(shape, ranks), lr=1e-2, **form)
    twin.step(gradient)
    sharded.step(gradient)
    expected = twin.direction("1 probe 0.0")
    everything = [
        MatrixShard(
            "w", shape, [ContiguousPart(Block((0, shape[0]), (0, shape[1])), 0, gradient.numel())], 0, s.side, 0
        )
        for s in sharded.shards
    ]
    for targets in (sharded.shards, everything):
        for target, found in zip(targets, directions_on(sharded, targets), strict=True):
            coordinates = found.draw("1 probe 0.0")
            got = found.to_matrix(coordinates).dense(target)
            assert torch.allclose(got, sharded.cut(expected, target.part), atol=1e-6)
            assert found.square(coordinates) == pytest.approx(expected.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 3), (4, 2)])
def test_directions_on_tensor_parallel_blocks_equal_the_whole_matrixs(tensor, data, shape, split, form):
    """Below ZeRO 3 a rank moves its whole block, whichever part of it the rank updates."""
    torch.manual_seed(0)
    gradient, order = torch.randn(shape), grid_order(tensor, data)
    blocks = tensor_blocks(shape, split, tensor)
    parts = grid_parts(blocks, [cuts_inside_rows(blocks[0].numel, data)] * tensor, order)
    twin = DenseLorenza(torch.zeros(shape), **form)
    sharded = ShardedMatrix("Lorenza", torch.zeros(shape), parts, lr=1e-2, **form)
    twin.step(gradient)
    sharded.step(gradient)
    expected = twin.direction("1 probe 0.0")
    targets = [
        MatrixShard("w", shape, [ContiguousPart(blocks[t], 0, blocks[t].numel)], 0, sharded.shards[0].side, 0)
        for t, _ in order
    ]
    assembled, squares = torch.full(shape, torch.nan), set()
    for (t, _), target, directions in zip(order, targets, directions_on(sharded, targets), strict=True):
        coordinates = directions.draw("1 probe 0.0")
        (r0, r1), (c0, c1) = blocks[t].rows, blocks[t].cols
        moved = directions.to_matrix(coordinates).dense(target).view(r1 - r0, c1 - c0)
        found = assembled[r0:r1, c0:c1]
        assert found.isnan().all() or torch.equal(found, moved)  # data ranks move alike
        assembled[r0:r1, c0:c1] = moved
        squares.add(directions.square(coordinates))
    assert (assembled - expected).norm() < 1e-6 * expected.norm()
    (square,) = squares
    assert square == pytest.approx(expected.square().sum().item(), rel=1e-5)
