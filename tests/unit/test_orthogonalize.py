"""Orthogonalizing a momentum: exactly, by Newton-Schulz, from a Gram matrix, and over ranks."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.methods.blocks.orthogonalize import (
    exact_parts,
    inverse_root,
    newton_schulz,
    newton_schulz_factor,
    orthogonalized,
    polar_factor,
)
from ds_lowrank.methods.blocks.whole import whole_orthogonalized
from ds_lowrank.sharding.reduce import lockstep
from ds_lowrank.sharding.world import SimulatedWorld
from tests.simulated.harness import ShardedMatrix, even_parts


def with_singular_values(values, rows=12):
    """A matrix, rows x len(values), with these singular values."""
    torch.manual_seed(0)
    values = torch.tensor(values, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64)).Q for n in (rows, len(values)))
    return u * values @ v.T, u @ v.T


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e16])
def test_polar_factor_ignores_singular_values(size):
    matrix, expected = with_singular_values([1.0, 0.5, 1e-2, 1e-3])
    for one, polar in ((matrix, expected), (matrix.T, expected.T)):
        found = polar_factor((one * size).float()[None])[0]
        assert torch.allclose(found.double(), polar, atol=1e-3)  # 1e-3 of the largest has lost three digits


def test_singular_values_that_are_rounding_count_as_zero():
    matrix, _ = with_singular_values([1.0, 0.5, 1e-8, 0.0])
    values = torch.linalg.svdvals(polar_factor(matrix.float()[None])[0])
    assert torch.allclose(values, torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=1e-5)


def test_a_matrix_of_zeros_stays_zero():
    zeros = torch.zeros(2, 5, 3)
    assert not polar_factor(zeros).any() and not newton_schulz(zeros).any()
    assert not inverse_root(zeros.mT.double() @ zeros.double()).any()


def test_newton_schulz_brings_singular_values_near_one():
    matrix, polar = with_singular_values([1.0, 0.5, 0.1, 0.05, 0.02])
    found = newton_schulz(matrix.float()[None])[0].double()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.68 and values.max() < 1.21
    assert torch.linalg.matrix_norm(found @ polar.T - (found @ polar.T).T) < 1e-4  # the same singular vectors


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_newton_schulz_from_the_gram_matrix_is_the_same(shape):
    torch.manual_seed(0)
    matrix = torch.randn(2, *shape)
    gram = matrix.double().mT @ matrix.double()
    assert torch.allclose(matrix @ newton_schulz_factor(gram).float(), newton_schulz(matrix), atol=1e-5)


def test_sums_of_parts_are_sums_of_numbers():
    """Of 100 ranks; the sum of the numbers themselves in fp32 would be wrong by 1e-8."""
    torch.manual_seed(0)
    grams = [torch.rand(1, 4, 4, dtype=torch.float64) / 100 for _ in range(100)]
    summed = torch.zeros(1, 4, 12)
    for gram in grams:
        summed += exact_parts(gram)
    found = torch.stack(summed.double().split(4, dim=2)).sum(0)
    assert (found - torch.stack(grams).sum(0)).abs().max() < 1e-15


@pytest.mark.parametrize("rule", ["exact", "newton_schulz"])
@pytest.mark.parametrize("ranks", [1, 3, 5])
@pytest.mark.parametrize("size", [1e-40, 1.0, 1e15])
def test_rows_over_ranks_are_orthogonalized_as_one_matrix(ranks, rule, size):
    matrix, _ = with_singular_values([1.0, 0.3, 0.1, 1e-2], rows=17)
    expected = (polar_factor if rule == "exact" else newton_schulz)(matrix.float()[None])[0]
    world = ShardedMatrix("Sumo", torch.zeros(17, 9), even_parts((17, 9), ranks), rank=4, proj_type="std")
    shards = [world.shard(rank) for rank in range(ranks)]
    owned = [shard.kept.own((matrix * size).float()[None]) for shard in shards]
    programs = [lockstep([orthogonalized(*pair, rule)]) for pair in zip(shards, owned, strict=True)]
    found = torch.zeros(17, 4)
    for shard, (rows,) in zip(shards, SimulatedWorld(ranks).run(programs), strict=True):
        position = 0
        for lo, hi in shard.kept.owned:
            found[lo:hi] = rows[0, position : position + hi - lo]
            position += hi - lo
    assert torch.allclose(found, expected, atol=1e-3 if size < 1e-30 else 1e-4)
    programs = [lockstep([whole_orthogonalized(*pair, rule)]) for pair in zip(shards, owned, strict=True)]
    for shard, (rows,) in zip(shards, SimulatedWorld(ranks).run(programs), strict=True):
        lo, hi = shard.kept.held
        assert torch.allclose(rows[0], expected[lo:hi], atol=1e-3 if size < 1e-30 else 1e-4)
