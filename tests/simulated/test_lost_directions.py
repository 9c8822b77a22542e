"""Bases that follow the gradient, where the first gradients have fewer directions than the basis has columns."""

from __future__ import annotations

import pytest
import torch

from tests.simulated.harness import ShardedMatrix, even_parts

CASES = [
    ("LDAdam", {"rank": 6}),
    ("LDAdam", {"rank": 6, "error_feedback": True}),
    ("Cosmos", {"rank": 6}),
    ("SubTrack", {"rank": 6, "update_proj_gap": 2, "step_size": 1e-3}),
]


def of_rank(rank, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_directions_that_come_later_are_found(shape, method, options):
    """Three gradients of rank two, then of full rank: no column is lost for good, and layouts agree."""
    one, three = (
        ShardedMatrix(method, torch.zeros(shape), even_parts(shape, ranks), lr=1e-2, **options) for ranks in (1, 3)
    )
    live = []
    for step in range(8):
        gradient = of_rank(2 if step < 3 else 20, shape, step)
        one.step(gradient)
        three.step(gradient)
        lengths = one.states[0]["basis"].norm(dim=0)
        live.append(lengths.count_nonzero())
        assert (lengths[lengths > 0] - 1).abs().max() < 1e-6
        assert (one.weight - three.weight).norm() < 2e-5 * one.weight.norm()
    assert live[0] == 2
    assert live[-1] == 6


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-5, 1e14])
def test_gradients_of_any_size_give_the_same_directions(size, method, options):
    """Squares of these leave the range of fp32."""
    worlds = [
        ShardedMatrix(method, torch.zeros(40, 20), even_parts((40, 20), ranks), lr=1e-2, eps=1e-36, **options)
        for ranks in (1, 3)
    ]
    for step in range(5):
        for world in worlds:
            world.step(size * of_rank(20, (40, 20), step))
    one, three = (world.weight for world in worlds)
    assert one.isfinite().all()
    assert (one - three).norm() < 2e-5 * one.norm()
    basis = worlds[0].states[0]["basis"]
    assert (basis.mT @ basis - torch.eye(6)).abs().max() < 1e-5
