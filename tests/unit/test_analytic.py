"""Mathematics of the package that no comparison with the dense references reaches: extreme sizes, statistics, ranks.

What the papers promise is tested on the references, in ``tests/unit/references``; the simulated world holds the package
to them.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from ds_lowrank.linalg.energy import leading_coordinates, smallest_rank, spectrum
from ds_lowrank.methods import METHODS
from ds_lowrank.methods.online_subspace_descent import pca_gradient
from ds_lowrank.methods.vlorp import ProjectedUnits, VLoRPOptions, draw, resample
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.reference import online_subspace_descent as reference
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.layout import whole
from ds_lowrank.sharding.matrix import shard_of
from ds_lowrank.sharding.reduce import SingleProcess, lockstep
from ds_lowrank.sharding.units import Units


def run_alone(program):
    (result,) = SingleProcess().run(lockstep([program]))
    return result


def alone(gradient, side="right"):
    """One matrix on one rank, with weights of zeros."""
    geometry = Geometry(tuple(gradient.shape), [whole(gradient.shape)], 0, side)
    return shard_of("w", geometry, gradient.reshape(-1), torch.zeros(gradient.numel()))


def steps(name, gradients, **options):
    """The weights of one matrix that starts at zero, after each gradient."""
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = OPTIMIZERS[name]([("w", weight)], **{"lr": 1.0, **options})
    after = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        after.append(weight.detach().clone())
    return after


# VLoRP


def test_projection_is_drawn_once_a_step_and_changes_every_gap(monkeypatch):
    found = []
    monkeypatch.setattr(
        "ds_lowrank.methods.vlorp.draw", lambda u, o, counter: found.append(counter) or draw(u, o, counter)
    )
    torch.manual_seed(0)
    steps("VLoRP", [torch.randn(10, 6) for _ in range(5)], rank=2, granularity=1, update_proj_gap=2)
    assert found == [0, 0, 1, 1, 2]


def test_reprojected_moment_keeps_its_expected_length():
    """The mean over seeds of the lifted moment's squared length, after over before: 1 within four standard errors."""
    torch.manual_seed(0)
    shard, ratios = alone(torch.randn(8, 24)), []
    units, (piece,) = Units(shard, Fraction(2)), shard.weights.pieces
    for seed in range(2000):
        options = VLoRPOptions(rank=3, granularity=2, update_proj_gap=5, moment_on_resample="reproject", seed=seed)
        old, new = (draw(units, options, counter) for counter in (0, 1))
        moment = torch.randn(1, 8, 6)
        state = {"exp_avg": moment.clone(), "step": 5}
        resample(shard, state, options, ProjectedUnits(torch.empty(0), True, projection=new))
        before, after = (units.lift(*of, piece).square().sum() for of in ((moment, old), (state["exp_avg"], new)))
        ratios.append(after / before)
    ratios = torch.stack(ratios)
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / len(ratios) ** 0.5


# Online Subspace Descent


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pca_lambda", [0.0, 0.1])
@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
def test_pca_gradient_is_exact_at_any_size_of_the_gradient(side, pca_lambda, size):
    torch.manual_seed(0)
    gradient, basis = torch.randn(14, 9), torch.randn(9, 4)
    expected = reference.pca_gradient(basis, gradient / gradient.norm(), pca_lambda)
    shard = alone((gradient if side == "right" else gradient.T.contiguous()) * size, side)
    basis, safe_scale = basis.unsqueeze(0), torch.full((1, 1, 1), size)
    (got,) = run_alone(pca_gradient(shard, basis, shard.times(basis), pca_lambda, safe_scale))
    assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("basis_init", ["svd", "randomized"])
def test_first_gradient_of_rank_1_does_not_cap_the_basis(basis_init):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(30, 16))
    options = {"rank": 8, "basis_init": basis_init, "lr": 1e-2}
    optimizer = OPTIMIZERS["OnlineSubspaceDescent"]([("w", weight)], **options)
    weight.grad = torch.outer(torch.randn(30), torch.randn(16))
    for _ in range(50):
        optimizer.step()
        weight.grad = torch.randn(30, 16)
    assert torch.linalg.svdvals(optimizer.slots[0].state["basis"]).min() > 0.3


# AdaRankGrad


def test_change_of_subspace_keeps_the_size_of_a_step():
    """With the default rule for the second moment, on a stationary gradient of 6 directions and noise."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    left, right = torch.randn(64, 6), torch.randn(6, 32)
    options = {"rank_max": 12, "update_proj_gap": 60, "residual_tol": 0.2, "grad_norm_ratio_tol": 0.0}
    optimizer = OPTIMIZERS["AdaRankGrad"]([("w", weight)], lr=1.0, **options)
    lengths = []
    for _ in range(61):
        before = weight.detach().clone()
        weight.grad = left @ right + 0.5 * torch.randn(64, 32)
        optimizer.step()
        lengths.append((weight.detach() - before).norm().item())
    assert optimizer.metrics()["lowrank/refreshes"] == 2
    assert 0.5 * lengths[59] < lengths[60] < 2 * lengths[59]


def test_smallest_rank_leaves_the_tail_of_the_singular_values():
    torch.manual_seed(0)
    matrix = torch.randn(1, 20, 4) @ torch.randn(4, 11)
    values, _ = spectrum(matrix)
    whole_norm = matrix.square().sum((1, 2)).double()
    assert smallest_rank(values, whole_norm, 1e-12).tolist() == [4]
    for rank in (1, 2, 3):
        left_out = ((values[0, rank:] ** 2).sum() / whole_norm).item()
        assert smallest_rank(values, whole_norm, left_out * 1.001).tolist() == [rank]
        assert smallest_rank(values, whole_norm, left_out * 0.999).tolist() == [rank + 1]


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e14])
def test_rank_does_not_depend_on_the_size_of_the_gradient(size):
    torch.manual_seed(0)
    gradient = torch.randn(20, 11) * 0.7 ** torch.arange(11)
    ranks = []
    for factor in (1.0, size):
        weight = torch.nn.Parameter(torch.zeros(20, 11))
        optimizer = OPTIMIZERS["AdaRankGrad"]([("w", weight)], rank_max=8)
        weight.grad = gradient * factor
        optimizer.step()
        ranks.append(optimizer.slots[0].rank)
    assert ranks[0] == ranks[1] not in (1, 8)


def test_rank_that_never_grows_still_rises_to_rank_min():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(20, 11))
    options = {"rank_max": 8, "rank_min": 4, "never_grow": True, "update_proj_gap": 1}
    optimizer = OPTIMIZERS["AdaRankGrad"]([("w", weight)], **options)
    ranks = []
    for k in (1, 11, 11):
        weight.grad = torch.randn(20, k) @ torch.randn(k, 11)
        optimizer.step()
        ranks.append(optimizer.slots[0].rank)
    assert ranks == [1, 4, 4]


def test_coordinates_of_a_subspace_ignore_signs_and_order():
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    turned = vectors.clone()
    turned[:, :3] = vectors[:, [2, 0, 1]] * torch.tensor([-1.0, 1.0, -1.0])
    expected, found = leading_coordinates(torch.stack([vectors, turned]), torch.tensor([3, 3]))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not expected[:, 3:].any()
    expected = expected[:, :3]
    assert torch.allclose(expected.T @ expected, torch.eye(3), atol=1e-6)
    span = vectors[:, :3].float()
    assert torch.allclose(span @ (span.T @ expected), expected, atol=1e-6)


# APOLLO


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_first_step_of_mini_ignores_the_size_of_the_gradient(factor):
    torch.manual_seed(0)
    gradient = torch.randn(12, 7)
    one, other = (steps("Apollo", [gradient * f], eps=1e-30, mini=True)[0] for f in (1.0, factor))
    assert (one - other).norm() < 1e-5 * one.norm()


def test_mini_has_its_own_rank_and_scale_and_refuses_another_rank():
    options = METHODS["Apollo"].Options(mini=True)
    assert (options.rank, options.scale) == (1, 128**0.5)
    assert METHODS["Apollo"].Options(mini=True, scale=2.0).scale == 2.0
    with pytest.raises(ValueError, match="mini has rank 1, got rank 4"):
        METHODS["Apollo"].Options(mini=True, rank=4)
