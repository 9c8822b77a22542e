"""LORENZA's directions: every layout draws the same ones, on its parts and on whole blocks, as the dense reference."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.methods.blocks.directions import Combination
from ds_lowrank.reference.lorenza import DenseLorenza
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.layout import Block, ContiguousPart
from ds_lowrank.sharding.matrix import shard_of
from tests.methods import of
from tests.simulated.harness import (
    ROUNDING,
    ShardedMatrix,
    directions_on,
    even_parts,
    flat,
    grid_order,
    grid_parts,
    tensor_blocks,
)
from tests.simulated.tensor_parallel import SPLITS, cuts_inside_rows

FORMS = [
    {"rank": 3},
    {"rank": 3, "right_factor": "svd"},
    {"rank": 3, "probe_form": "gaussian"},
    {"rank": 3, "proj_type": "reverse_std"},
    {"rank": None},
]


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
    whole = [ContiguousPart(Block((0, shape[0]), (0, shape[1])), 0, gradient.numel())]
    everything = [target_of(whole, sharded) for _ in range(ranks)]
    direction = Combination(["1 probe 0.0"], [1.0])
    for targets in (None, everything):
        for target, found in directions_on(sharded, targets):
            got = flat(found.to_matrix(direction), target)
            assert torch.allclose(got, sharded.cut(expected, target.part), atol=1e-6)
            assert found.square(direction) == pytest.approx(expected.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(17, 9), (9, 17)])
def test_pairs_of_singular_vectors_hold_all_of_the_projected_gradient(shape):
    """``Pi`` has one number for each pair ``f_k q_k^T``: what of H Q they hold is all that a probe can find."""
    torch.manual_seed(0)
    gradient, shares = torch.randn(shape), {}
    for factor in ("qr", "svd"):
        options = {"rank": 4, "lr": 1e-2, "right_factor": factor}
        sharded = ShardedMatrix("Lorenza", torch.zeros(shape), even_parts(shape, 1), **options)
        sharded.step(gradient)
        basis, kept = sharded.states[0]["basis"], sharded.states[0]["right_factor"]
        projected = (gradient if shape[0] > shape[1] else gradient.T) @ basis
        shares[factor] = ((kept * projected).sum(0).square().sum() / projected.square().sum()).item()
    assert shares["svd"] == pytest.approx(1, rel=1e-5)
    assert shares["qr"] < 0.99


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_directions_of_a_state_on_another_device_follow_the_weights(form):
    """As with optimizer offload; here the state is on the CPU and the weights are on no real device."""
    shape = (17, 9)
    sharded = ShardedMatrix("Lorenza", torch.zeros(shape), even_parts(shape, 2), lr=1e-2, **form)
    sharded.step(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    for target, found in directions_on(sharded, None):
        target.attach([torch.empty(target.part.numel, device="meta")], [torch.empty(target.part.numel, device="meta")])
        moved = found.on_device_of_weights()
        assert type(moved) is type(found)
        tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors)
        assert len(tensors) == sum(isinstance(value, torch.Tensor) for value in vars(found).values())


def target_of(parts, sharded):
    """What is moved, with weights attached that are as large as it."""
    geometry = sharded.matrices[0].geometry
    return shard_of("w", Geometry(geometry.shape, parts, 0, geometry.side), torch.empty(parts[0].numel))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 3), (4, 2)])
def test_directions_on_tensor_parallel_blocks_equal_the_whole_matrixs(tensor, data, shape, split, form):
    """Below ZeRO 3 a rank moves its whole block, whichever part of it the rank updates."""
    gradient, order = of("Lorenza").gradients_for(shape)(0), grid_order(tensor, data)
    blocks = tensor_blocks(shape, split, tensor)
    parts = grid_parts(blocks, [cuts_inside_rows(blocks[0].numel, data)] * tensor, order)
    twin = DenseLorenza(torch.zeros(shape), **form)
    sharded = ShardedMatrix("Lorenza", torch.zeros(shape), parts, lr=1e-2, **form)
    twin.step(gradient)
    sharded.step(gradient)
    expected = twin.direction("1 probe 0.0")
    targets = [target_of([ContiguousPart(blocks[t], 0, blocks[t].numel)], sharded) for t, _ in order]
    assembled, squares = torch.full(shape, torch.nan), set()
    direction = Combination(["1 probe 0.0"], [1.0])
    for (t, _), (target, directions) in zip(order, directions_on(sharded, targets), strict=True):
        (r0, r1), (c0, c1) = blocks[t].rows, blocks[t].cols
        moved = flat(directions.to_matrix(direction), target).view(r1 - r0, c1 - c0)
        found = assembled[r0:r1, c0:c1]
        assert found.isnan().all() or torch.equal(found, moved)  # data ranks move alike
        assembled[r0:r1, c0:c1] = moved
        squares.add(directions.square(direction))
    assert (assembled - expected).norm() < ROUNDING * expected.norm()
    (square,) = squares
    assert square == pytest.approx(expected.square().sum().item(), rel=1e-5)
