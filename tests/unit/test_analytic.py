"""What the papers' mathematics promises, checked on the package itself: no reference, closed forms only."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from ds_lowrank.linalg.energy import leading_coordinates, smallest_rank, spectrum
from ds_lowrank.methods import METHODS
from ds_lowrank.methods.adarankgrad import AdaptiveProjection, change_subspace
from ds_lowrank.methods.online_subspace_descent import pca_gradient
from ds_lowrank.methods.vlorp import ProjectedUnits, VLoRPOptions, draw, resample
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.sharding.layout import whole
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import SingleProcess, lockstep
from ds_lowrank.sharding.units import Units


def alone(program):
    (result,) = SingleProcess().run(lockstep([program]))
    return result


def shard_of(gradient, side="right", name="w"):
    shard = MatrixShard(name, tuple(gradient.shape), [whole(gradient.shape)], 0, side, 0)
    shard.attach(gradient.reshape(-1), torch.zeros(gradient.numel()))
    return shard


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("c", ["1", "3", "1/2", "3/2"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_projecting_and_lifting_is_unbiased_over_seeds_and_has_the_papers_variance(side, c, distribution):
    """E back(project(G)) = G and, for a Gaussian, E |back(project(G))|^2 = (1 + (L + 1) / r) |G|^2.

    The mean of N samples has a standard error of the root of (E|.|^2 - |G|^2) / N; four of them are allowed. For the
    squared norm the error is estimated from the samples.
    """
    torch.manual_seed(0)
    gradient, samples, rank = torch.randn(12, 6) if side == "right" else torch.randn(6, 12), 4000, 2
    units = Units(shard_of(gradient, side), Fraction(c))
    total, norms = torch.zeros(72), torch.empty(samples)
    for seed in range(samples):
        options = VLoRPOptions(rank=rank, granularity=c, distribution=distribution, seed=seed)
        projection = draw(units, options, 0)
        back = units.lift(units.times(projection), projection)
        total += back
        norms[seed] = back.square().sum()
    whole_norm = gradient.square().sum()
    error = (total / samples - gradient.reshape(-1)).norm()
    assert error < 4 * ((norms.mean() - whole_norm) / samples).sqrt()
    if distribution == "gaussian":
        expected = (1 + (units.length + 1) / rank) * whole_norm
        assert abs(norms.mean() - expected) < 4 * norms.std() / samples**0.5


def test_projecting_micro_batches_and_adding_is_projecting_their_sum():
    """Whole numbers small enough for sums to be exact in fp32: equal to the last bit."""
    torch.manual_seed(0)
    first, second = torch.randint(-8, 8, (2, 12, 6)).float()
    projection = torch.randint(-4, 4, (2, 3)).float()
    parts = [Units(shard_of(g), Fraction(3)).times(projection) for g in (first, second, first + second)]
    assert torch.equal(parts[0] + parts[1], parts[2])


def test_the_subspace_scheme_at_granularity_1_is_adam_on_a_random_projection():
    torch.manual_seed(0)
    gradients = [torch.randn(10, 6) for _ in range(4)]
    projection = draw(Units(shard_of(gradients[0]), Fraction(1)), VLoRPOptions(rank=3, granularity=1), 0)
    low = torch.nn.Parameter(torch.zeros(10, 3))
    adam = torch.optim.Adam([low], lr=1.0, eps=0.1)
    for gradient in gradients:
        low.grad = gradient @ projection
        adam.step()
    got = steps("VLoRP", gradients, rank=3, granularity=1, update_scheme="subspace", eps=0.1)[-1]
    assert (got - low.detach() @ projection.T).norm() < 1e-6 * got.norm()


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_projfactor_does_not_depend_on_the_scale_of_the_projection(factor, monkeypatch):
    """The official code's `scale` multiplies both its numerator and its root, and cancels but for epsilon."""
    torch.manual_seed(0)
    gradients = [torch.randn(10, 6) for _ in range(3)]
    options = {"rank": 2, "granularity": 3, "eps": 1e-30}
    plain = steps("VLoRP", gradients, **options)[-1]
    monkeypatch.setattr("ds_lowrank.methods.vlorp.draw", lambda *arguments: draw(*arguments) * factor)
    scaled = steps("VLoRP", gradients, **options)[-1]
    assert (plain - scaled).norm() < 1e-5 * plain.norm()


def test_the_projection_is_drawn_once_a_step_and_changes_every_gap_only(monkeypatch):
    found = []
    monkeypatch.setattr(
        "ds_lowrank.methods.vlorp.draw", lambda u, o, counter: found.append(counter) or draw(u, o, counter)
    )
    torch.manual_seed(0)
    steps("VLoRP", [torch.randn(10, 6) for _ in range(5)], rank=2, granularity=1, update_proj_gap=2)
    assert found == [0, 0, 1, 1, 2]


def test_a_reprojected_moment_keeps_its_expected_length():
    """The mean over seeds of the lifted moment's squared length, after over before: 1 within four standard errors."""
    torch.manual_seed(0)
    units, ratios = Units(shard_of(torch.randn(8, 24)), Fraction(2)), []
    for seed in range(2000):
        options = VLoRPOptions(rank=3, granularity=2, update_proj_gap=5, moment_on_resample="reproject", seed=seed)
        old, new = (draw(units, options, counter) for counter in (0, 1))
        moment = torch.randn(8, 6)
        state = {"exp_avg": moment.clone(), "step": 5}
        resample(state, options, ProjectedUnits(torch.empty(0), True, units=units, projection=new))
        ratios.append(units.lift(state["exp_avg"], new).square().sum() / units.lift(moment, old).square().sum())
    ratios = torch.stack(ratios)
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / len(ratios) ** 0.5


# Online Subspace Descent


def pca_loss(basis, gradient, pca_lambda):
    normalised = gradient / gradient.norm()
    left_out = (normalised @ basis @ basis.T - normalised).square().sum()
    return left_out + pca_lambda * (basis.T @ basis - torch.eye(basis.shape[1])).square().sum()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pca_lambda", [0.0, 0.1])
@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
def test_the_closed_form_is_the_gradient_of_the_loss(side, pca_lambda, size):
    torch.manual_seed(0)
    gradient, basis = torch.randn(14, 9), torch.randn(9, 4, requires_grad=True)
    pca_loss(basis, gradient, pca_lambda).backward()
    shard = shard_of((gradient if side == "right" else gradient.T.contiguous()) * size, side)
    found = basis.detach()
    got = alone(pca_gradient(shard, found, shard.times(found), pca_lambda, safe_scale=size))
    assert (got - basis.grad).norm() < 1e-5 * basis.grad.norm()


@pytest.mark.parametrize("chosen", [[0, 1, 2], [1, 3, 4]])
def test_the_pca_gradient_vanishes_at_singular_vectors(chosen):
    """At the leading ones the loss is least; at any others it has a saddle."""
    torch.manual_seed(0)
    gradient = torch.randn(14, 9)
    basis = torch.linalg.svd(gradient).Vh[chosen].T.contiguous()
    shard = shard_of(gradient)
    assert alone(pca_gradient(shard, basis, shard.times(basis), 0.1)).abs().max() < 1e-6


def test_descending_on_a_fixed_gradient_finds_its_leading_subspace():
    torch.manual_seed(0)
    gradient = torch.linalg.qr(torch.randn(14, 3)).Q @ torch.linalg.qr(torch.randn(9, 3)).Q.T
    weight = torch.nn.Parameter(torch.zeros(14, 9))
    options = {"rank": 3, "basis_init": "random", "basis_optimizer": "sgd", "basis_lr_ratio": 20.0}
    optimizer = OPTIMIZERS["OnlineSubspaceDescent"]([("w", weight)], lr=1e-2, **options)
    for _ in range(300):
        weight.grad = gradient.clone()
        optimizer.step()
    basis = optimizer.slots[0].state["basis"]
    assert (gradient - gradient @ basis @ basis.T).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("basis_init", ["svd", "randomized"])
def test_a_first_gradient_of_rank_1_does_not_cap_the_basis_for_ever(basis_init):
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


def test_the_default_rule_for_the_second_moment_keeps_the_size_of_a_step_over_a_change_of_subspace():
    """A stationary gradient of 6 directions and noise: the step after the change is as long as that before."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    left, right = torch.randn(64, 6), torch.randn(6, 32)
    options = {"rank_max": 12, "update_proj_gap": 60, "residual_tol": 0.2, "grad_norm_tol": 0.0}
    optimizer = OPTIMIZERS["AdaRankGrad"]([("w", weight)], lr=1.0, **options)
    lengths = []
    for _ in range(61):
        before = weight.detach().clone()
        weight.grad = left @ right + 0.5 * torch.randn(64, 32)
        optimizer.step()
        lengths.append((weight.detach() - before).norm().item())
    assert optimizer.metrics()["lowrank/refreshes"] == 2
    assert 0.5 * lengths[59] < lengths[60] < 2 * lengths[59]


def test_the_residual_is_what_the_singular_values_leave_and_a_rank_k_matrix_has_rank_k():
    torch.manual_seed(0)
    matrix = torch.randn(20, 4) @ torch.randn(4, 11)
    basis = torch.linalg.qr(torch.randn(11, 6)).Q
    inside = matrix @ basis
    pythagoras = matrix.square().sum() - inside.square().sum()
    assert abs(pythagoras - (matrix - inside @ basis.T).square().sum()) < 1e-5 * matrix.square().sum()
    values, _ = spectrum(matrix)
    whole_norm = matrix.square().sum().double()
    assert smallest_rank(values, whole_norm, 1e-12) == 4
    for rank in (1, 2, 3):
        left_out = ((values[rank:] ** 2).sum() / whole_norm).item()
        assert smallest_rank(values, whole_norm, left_out * 1.001) == rank
        assert smallest_rank(values, whole_norm, left_out * 0.999) == rank + 1


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_gradient_of_rank_k_gets_rank_k(k):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(20, 11))
    optimizer = OPTIMIZERS["AdaRankGrad"]([("w", weight)], rank_max=8, rank_min=6, residual_tol=1e-6)
    weight.grad = torch.randn(20, k) @ torch.randn(k, 11)
    optimizer.step()
    assert optimizer.slots[0].rank == k  # also below rank_min: there are no more directions


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e14])
def test_the_rank_does_not_depend_on_the_size_of_the_gradient(size):
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


def test_a_rank_that_never_grows_still_rises_to_rank_min():
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


def test_coordinates_of_a_subspace_do_not_depend_on_signs_or_order():
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    expected = leading_coordinates(vectors, 3)
    turned = vectors.clone()
    turned[:, :3] = vectors[:, [2, 0, 1]] * torch.tensor([-1.0, 1.0, -1.0])
    assert torch.allclose(leading_coordinates(turned, 3), expected, atol=1e-6)
    assert torch.allclose(expected.T @ expected, torch.eye(3), atol=1e-6)
    span = vectors[:, :3].float()
    assert torch.allclose(span @ (span.T @ expected), expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["abs", "clamp", "squared"])
def test_a_subspace_turned_in_itself_leaves_the_lifted_first_moment_as_it_is(rule):
    """Q_new = Q_old O: M Q^T is unchanged, and V stays at least zero."""
    torch.manual_seed(0)
    options = METHODS["AdaRankGrad"].Options(rank_max=4, second_moment=rule)
    shard = shard_of(torch.randn(12, 9))
    old, turn = torch.linalg.qr(torch.randn(9, 4)).Q, torch.linalg.qr(torch.randn(4, 4)).Q
    state = {"basis": old, "exp_avg": torch.randn(12, 4), "exp_avg_sq": torch.rand(12, 4), "rank": 4, "age": 7}
    lifted = state["exp_avg"] @ old.T
    new = old @ turn
    alone(change_subspace(shard, state, options, AdaptiveProjection(torch.empty(0), True, own=new, basis=new, rank=4)))
    assert torch.allclose(state["exp_avg"] @ state["basis"].T, lifted, atol=1e-5)
    assert (state["exp_avg_sq"] >= 0).all()
    assert (state["rank"], state["age"]) == (4, 0)


# Inner optimizers


@pytest.mark.parametrize(
    ("method", "options"),
    [("GaLore", {"update_proj_gap": 2, "moments": "rotate"}), ("OnlineSubspaceDescent", {"basis_lr_ratio": 0.0})],
)
def test_a_full_basis_with_momentum_is_unprojected_momentum(method, options):
    """With as many directions as the smaller dimension, Q Q^T = I, and momentum is carried exactly."""
    torch.manual_seed(0)
    gradients = [torch.randn(12, 5) for _ in range(5)]
    plain = torch.nn.Parameter(torch.zeros(12, 5))
    sgd = torch.optim.SGD([plain], lr=1.0, momentum=0.9)
    for gradient in gradients:
        plain.grad = gradient.clone()
        sgd.step()
    got = steps(method, gradients, rank=5, scale=1.0, inner="sgd", momentum=0.9, **options)[-1]
    assert (got - plain.detach()).norm() < 1e-5 * plain.detach().norm()


# APOLLO


@pytest.mark.parametrize("options", [{"rank": 3}, {"mini": True}], ids=str)
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_first_step_does_not_depend_on_the_size_of_the_gradient(factor, options):
    torch.manual_seed(0)
    gradient = torch.randn(12, 7)
    one, other = (steps("Apollo", [gradient * f], eps=1e-30, **options)[0] for f in (1.0, factor))
    assert (one - other).norm() < 1e-5 * one.norm()


def test_mini_goes_along_the_gradient_and_apollo_along_each_channel_of_it():
    torch.manual_seed(0)
    gradients = [torch.randn(12, 7) for _ in range(3)]
    for options, along in (({"mini": True}, lambda w: w.flatten()[None]), ({"rank": 3}, lambda w: w)):
        before, after = steps("Apollo", gradients, **options)[-2:]
        cosines = torch.nn.functional.cosine_similarity(along(before - after), along(gradients[-1]), dim=1)
        assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-6)


def test_the_limiter_bounds_how_fast_the_update_grows():
    torch.manual_seed(0)
    gradient = torch.randn(12, 7)
    # The second moment forgets at once, the first does not: the ratio, and with it the update, jumps after small steps.
    gradients = [gradient * size for size in (1.0, 1e-3, 1.0, 1.0)]
    options = {"rank": 3, "betas": (0.9, 0.0)}
    free, held = (
        [weights.norm() for weights in torch.stack(after).diff(dim=0, prepend=torch.zeros(1, 12, 7))]
        for after in (steps("Apollo", gradients, norm_growth_limit=limit, **options) for limit in (None, 1.5))
    )
    assert any(b > 1.6 * a for a, b in pairwise(free))
    assert all(b < 1.5001 * a for a, b in pairwise(held))


def test_mini_has_its_own_rank_and_scale_and_says_when_they_are_contradicted():
    options = METHODS["Apollo"].Options(mini=True)
    assert (options.rank, options.scale) == (1, 128**0.5)
    assert METHODS["Apollo"].Options(mini=True, scale=2.0).scale == 2.0
    with pytest.raises(ValueError, match="mini has rank 1, got rank 4"):
        METHODS["Apollo"].Options(mini=True, rank=4)
