"""What is known of each method by analysis, on the dense references that the package is measured against."""

import pytest
import torch

from ds_lowrank.reference import (
    DENSE,
    DenseAdaRankGrad,
    DenseApollo,
    DenseGaLore,
    DenseOnlineSubspaceDescent,
    DenseVLoRP,
)
from ds_lowrank.reference.galore import DenseAdamW, positive_qr
from ds_lowrank.reference.inner import Adafactor
from ds_lowrank.reference.online_subspace_descent import pca_gradient, pca_loss

NEGLIGIBLE = 1e-30
"""An epsilon that no value here comes near."""
ROUNDING = 1e-10
"""Far above a few hundred roundings of fp64 (1e-16 each) in values near one, far below any real difference."""

SIDES = {"right": (12, 8), "left": (8, 12)}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=ROUNDING):
    return (a - b).norm() <= tolerance * b.norm()


def matrix_with(singular_values, m=12, n=8):
    u, v = (
        positive_qr(gaussian(m, len(singular_values), seed=1)),
        positive_qr(gaussian(n, len(singular_values), seed=2)),
    )
    return (u * torch.tensor(singular_values, dtype=torch.float64)) @ v.T


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", DENSE)
def test_a_transposed_weight_is_changed_in_place_and_alike(name):
    """``std`` picks the side by the shape: the transposed problem has the transposed solution."""
    options = {"granularity": 2} if name == "VLoRP" else {}
    weight = gaussian(12, 8, seed=3)
    turned = weight.clone()
    straight = DENSE[name](weight, weight_decay=0.1, **options)
    turned_too = {"norm_axis": "input"} if name == "GradNormLoRP" else {}
    transposed = DENSE[name](turned.T, weight_decay=0.1, **options, **turned_too)
    for step in range(3):
        gradient = gaussian(12, 8, seed=step)
        straight.step(gradient)
        transposed.step(gradient.T)
    assert close(turned, weight)


# The inner rules


@pytest.mark.parametrize("moments", ["keep", "rotate"])
@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_full_rank_galore_with_momentum_is_plain_momentum(shape, moments):
    """An orthonormal basis of everything is a change of coordinates, to which a linear rule is blind. A kept moment
    needs the kept basis."""
    gap = 2 if moments == "rotate" else 100
    plain = torch.nn.Parameter(gaussian(*shape, seed=3))
    weight = plain.detach().clone()
    oracle = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    options = {"inner": "sgd", "momentum": 0.9, "moments": moments}
    dense = DenseGaLore(weight, rank=8, scale=1.0, lr=0.1, update_proj_gap=gap, **options)
    for step in range(6):
        plain.grad = gaussian(*shape, seed=10 + step)
        oracle.step()
        dense.step(plain.grad)
    assert close(weight, plain.detach())


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_full_rank_online_subspace_descent_with_momentum_is_plain_momentum(shape):
    """A complete orthonormal basis is where the PCA loss is zero: SGD leaves it there."""
    plain = torch.nn.Parameter(gaussian(*shape, seed=3))
    weight = plain.detach().clone()
    oracle = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    dense = DenseOnlineSubspaceDescent(weight, scale=1.0, lr=0.1, inner="sgd", momentum=0.9, basis_optimizer="sgd")
    for step in range(6):
        plain.grad = gaussian(*shape, seed=10 + step)
        oracle.step()
        dense.step(plain.grad)
    assert close(weight, plain.detach())


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_full_rank_galore_with_the_original_lion_is_lion(shape):
    weight, plain, m = gaussian(*shape, seed=3), gaussian(*shape, seed=3), zeros(*shape)
    dense = DenseGaLore(weight, rank=8, scale=1.0, lr=0.1, inner="lion", lion_sign="original", betas=(0.9, 0.99))
    for step in range(4):
        gradient = gaussian(*shape, seed=10 + step)
        plain -= 0.1 * torch.sign(0.9 * m + 0.1 * gradient)
        m = 0.99 * m + 0.01 * gradient
        dense.step(gradient)
    assert close(weight, plain)


def test_lion_in_the_subspace_steps_along_signs_of_its_coordinates():
    weight = zeros(12, 8)
    dense = DenseGaLore(weight, scale=0.5, lr=0.1, inner="lion")
    gradient = gaussian(12, 8)
    dense.step(gradient)
    assert close(weight @ dense.basis, -0.05 * torch.sign(gradient @ dense.basis))


def test_adafactor_is_torchs():
    """torch's rate is ``max(eps[1], rms(weight)) * min(lr, 1/sqrt(t))``: lr, from zero weights with eps[1] = 1."""
    plain = torch.nn.Parameter(zeros(12, 4))
    weight = zeros(12, 4)
    oracle = torch.optim.Adafactor([plain], lr=1e-3, eps=(1e-15, 1.0), weight_decay=0.0)
    rule = Adafactor()
    for step, factor in enumerate((1.0, 0.1, 10.0, 0.01, 1.0)):  # only some of the steps are clipped
        plain.grad = factor * gaussian(12, 4, seed=step)
        oracle.step()
        weight -= 1e-3 * rule.direction(plain.grad)
    assert close(weight, plain.detach())


def test_a_factored_second_moment_is_not_rotated():
    with pytest.raises(ValueError, match="moments='keep'"):
        DenseGaLore(zeros(12, 8), inner="adafactor", moments="rotate")


# Online Subspace Descent


@pytest.mark.parametrize("pca_lambda", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [0, 3, 6]], ids=["leading", "any"])
def test_the_pca_gradient_is_zero_at_singular_vectors(chosen, pca_lambda):
    gradient = gaussian(12, 8)
    gradient /= gradient.norm()
    _, _, vh = torch.linalg.svd(gradient)
    assert pca_gradient(vh[chosen].T, gradient, pca_lambda).norm() < ROUNDING


def test_the_pca_gradient_by_autograd_is_the_closed_form():
    """2 [Q R^T R + G^T R Q^T Q - 2 G^T R] + 4 lambda Q (Q^T Q - I), away from orthonormal bases."""
    gradient, q = gaussian(12, 8), gaussian(8, 3, seed=1)
    r, gram = gradient @ q, q.T @ q
    pull = gradient.T @ r
    expected = 2 * (q @ (r.T @ r) + pull @ gram - 2 * pull) + 0.4 * q @ (gram - torch.eye(3, dtype=torch.float64))
    assert close(pca_gradient(q, gradient, 0.1), expected)


@pytest.mark.parametrize("basis_init", ["svd", "randomized", "random"])
def test_only_a_random_first_basis_is_improved_on_the_gradient_it_meets_first(basis_init):
    gradient = gaussian(12, 8)
    dense = DenseOnlineSubspaceDescent(zeros(12, 8), rank=3, lr=0.0, basis_init=basis_init)
    dense.step(gradient)
    first = dense.basis
    moving = DenseOnlineSubspaceDescent(zeros(12, 8), rank=3, lr=1e-3, basis_init=basis_init, eps=NEGLIGIBLE)
    moving.step(gradient)
    # Adam's first step is lr_P = 5 lr in every element.
    moved = torch.full_like(first, 5e-3 if basis_init == "random" else 0.0)
    assert torch.allclose((moving.basis - first).abs(), moved, atol=1e-12)


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_the_basis_descends_to_the_leading_subspace_of_a_gradient_that_stays(shape):
    gradient = matrix_with([3.0, 2.0, 0.5, 0.2], *shape)
    options = {"basis_init": "random", "basis_optimizer": "sgd", "basis_lr_ratio": 1.0}
    dense = DenseOnlineSubspaceDescent(zeros(*shape), rank=2, lr=0.2, **options)
    for _ in range(300):
        dense.step(gradient)
    H = gradient if dense.right else gradient.T
    left_out = (0.5**2 + 0.2**2) / gradient.square().sum()
    assert pca_loss(dense.basis, H / H.norm(), 0.1).item() == pytest.approx(left_out.item(), rel=1e-9)


def test_a_zero_gradient_does_not_move_the_basis():
    dense = DenseOnlineSubspaceDescent(zeros(12, 8), rank=3, weight_decay=0.1)
    dense.step(gaussian(12, 8))
    before = dense.basis
    dense.step(zeros(12, 8))
    assert torch.equal(dense.basis, before)


# VLoRP

VIEWS = {
    "right": ((8, 12), {"proj_type": "right"}),
    "left": ((12, 8), {"proj_type": "left"}),
    "official left": ((12, 8), {"proj_type": "left", "left_view": "official"}),
}


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("granularity", ["1/2", 1, 3])
@pytest.mark.parametrize("view", VIEWS)
def test_there_and_back_is_unbiased_with_the_known_second_moment(view, granularity, distribution):
    """E[P P^T] = I; E||.||^2 is 1 + (L+1)/r times ||G||^2 for normal entries, 1 + (L-1)/r for signs (E p^4 = 1/r^2).

    Seeds are independent draws, so a mean over them has the standard error of the sample; five of those leave out one
    normal variable in two million, and there are 97 here.
    """
    shape, options = VIEWS[view]
    gradient, draws, rank = gaussian(*shape), 1500, 2
    dense = DenseVLoRP(zeros(*shape), granularity=granularity, distribution=distribution, rank=rank, **options)
    estimates = []
    for counter in range(draws):
        P = dense.projection(counter)
        estimates.append(dense.unview(dense.view(gradient) @ P @ P.T))
    estimates = torch.stack(estimates)
    energies = estimates.square().sum((1, 2))
    spread = {"gaussian": dense.length + 1, "rademacher": dense.length - 1}[distribution]
    assert dense.length == 12 / dense.c
    assert ((estimates.mean(0) - gradient).abs() <= 5 * estimates.std(0) / draws**0.5).all()
    expected = (1 + spread / rank) * gradient.square().sum()
    assert (energies.mean() - expected).abs() <= 5 * energies.std() / draws**0.5


def test_a_unit_is_a_piece_of_a_row_or_of_a_column_or_officially_every_cth_row():
    gradient = torch.arange(32.0).view(8, 4)
    right = DenseVLoRP(torch.zeros(8, 4), granularity=2)
    left = DenseVLoRP(torch.zeros(8, 4), granularity=2, proj_type="left")
    official = DenseVLoRP(torch.zeros(8, 4), granularity=2, proj_type="left", left_view="official")
    assert right.view(gradient)[1].tolist() == [2.0, 3.0]
    assert left.view(gradient)[1].tolist() == [16.0, 20.0, 24.0, 28.0]
    assert official.view(gradient)[1].tolist() == [1.0, 9.0, 17.0, 25.0]
    for dense in (right, left, official):
        assert torch.equal(dense.unview(dense.view(gradient)), gradient)


@pytest.mark.parametrize("view", VIEWS)
def test_projected_micro_batches_add_up(view):
    shape, options = VIEWS[view]
    dense = DenseVLoRP(zeros(*shape), granularity=3, **options)
    P = dense.projection(0)
    batches = [gaussian(*shape, seed=seed) for seed in range(4)]
    assert close(sum(dense.view(batch) @ P for batch in batches), dense.view(sum(batches)) @ P)


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_the_subspace_scheme_with_whole_rows_is_adam_on_a_random_projection(shape):
    weight, projected = zeros(*shape), zeros(12, 3)
    dense = DenseVLoRP(weight, rank=3, granularity=1, update_scheme="subspace")
    adam, P = DenseAdamW(projected, eps=1e-6), dense.projection(0)
    for step in range(5):
        gradient = gaussian(*shape, seed=step)
        dense.step(gradient)
        adam.step((gradient if dense.right else gradient.T) @ P)
    assert close(weight if dense.right else weight.T, projected @ P.T)


@pytest.mark.parametrize("bias_correction", ["sqrt", "linear"])
@pytest.mark.parametrize("eps_position", ["outside", "inside"])
@pytest.mark.parametrize("view", VIEWS)
def test_projfactor_does_not_see_a_factor_on_the_projection(view, eps_position, bias_correction):
    class Sevenfold(DenseVLoRP):
        def projection(self, counter):
            return 7 * super().projection(counter)

    shape, options = VIEWS[view]
    options = {**options, "eps_position": eps_position, "bias_correction": bias_correction, "eps": NEGLIGIBLE}
    weights = [zeros(*shape), zeros(*shape)]
    rules = [kind(w, granularity=3, **options) for kind, w in zip((DenseVLoRP, Sevenfold), weights, strict=True)]
    for step in range(4):
        for rule in rules:
            rule.step(gaussian(*shape, seed=step))
    assert close(*weights)


def test_projfactor_is_adam_where_squared_gradients_are_multiples_of_one_outer_product():
    """There its factors are the second moment. c = n makes every element a unit, P a number that cancels."""
    gradient = torch.outer(gaussian(8).abs() + 0.1, gaussian(6, seed=1))
    weights = [zeros(8, 6), zeros(8, 6)]
    for weight, scheme in zip(weights, ("projfactor", "original_space"), strict=True):
        dense = DenseVLoRP(weight, rank=1, granularity=6, update_scheme=scheme, eps=NEGLIGIBLE)
        for factor in (1.0, -3.0, 0.5):
            dense.step(factor * gradient)
    assert close(*weights)


@pytest.mark.parametrize("scheme", ["projfactor", "subspace"])
def test_a_reset_moment_starts_again(scheme):
    """Both moments of the subspace scheme restart: after a reset it is a new optimizer, but for the projection."""
    dense = DenseVLoRP(zeros(12, 8), granularity=2, update_proj_gap=2, update_scheme=scheme, moment_on_resample="reset")
    for step in range(3):
        before = dense.weight.clone()
        gradient = gaussian(12, 8, seed=step)
        dense.step(gradient)
    P = dense.projection(1)
    R = dense.view(gradient) @ P
    moved = before - dense.weight
    if scheme == "subspace":
        assert close(moved, 1e-2 * dense.unview((R / (R.abs() + 1e-6)) @ P.T))
    else:
        vhat = torch.outer(dense.v_row, dense.v_col) / dense.v_row.sum() / (1 - 0.999**3)
        # eps stands beside the uncorrected root: 1e-6 of values above 1e-2.
        assert close(moved, 1e-2 * dense.unview(R @ P.T) / vhat.sqrt(), 1e-4)


def test_a_reprojected_moment_is_the_old_one_seen_in_the_new_projection():
    dense = DenseVLoRP(zeros(12, 8), granularity=2, update_proj_gap=1, moment_on_resample="reproject")
    first, second = gaussian(12, 8, seed=0), gaussian(12, 8, seed=1)
    dense.step(first)
    dense.step(second)
    old, new = dense.projection(0), dense.projection(1)
    lifted = dense.view(first) @ old @ old.T / (1 + (dense.length + 1) / dense.rank) ** 0.5
    assert close(dense.M, (0.9 * 0.1 * lifted + 0.1 * dense.view(second)) @ new)


def test_moments_of_the_original_space_have_nothing_to_resample():
    with pytest.raises(ValueError, match="moment_on_resample='keep'"):
        DenseVLoRP(zeros(12, 8), granularity=1, update_scheme="original_space", moment_on_resample="reset")


def test_a_granularity_that_does_not_divide_is_refused():
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        DenseVLoRP(zeros(12, 8), granularity=3)


# AdaRankGrad


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_what_the_basis_captures_and_what_it_leaves_make_up_the_gradient(shape):
    gradient = gaussian(*shape)
    dense = DenseAdaRankGrad(zeros(*shape), rank_max=5, residual_tol=0.5)
    dense.step(gradient)
    H, Q = (gradient if dense.right else gradient.T), dense.basis
    assert close(Q.T @ Q, torch.eye(dense.rank, dtype=torch.float64))
    left_out = (H - H @ Q @ Q.T).square().sum()
    assert close(H.square().sum() - (H @ Q).square().sum(), left_out)
    assert left_out <= 0.5 * H.square().sum()


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_a_gradient_of_rank_k_gets_rank_k(shape, k):
    dense = DenseAdaRankGrad(zeros(*shape), residual_tol=0.0)
    dense.step(matrix_with([1.5**-i for i in range(k)], *shape))
    assert dense.rank == k


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"residual_tol": 0.5}, 1),
        ({"residual_tol": 0.2}, 2),  # 64, 16, 4 and 1 of 85: the tail beyond two is 5/85
        ({"residual_tol": 0.05}, 3),
        ({"residual_tol": 0.001}, 4),
        ({"residual_tol": 0.5, "rank_min": 3}, 3),
        ({"residual_tol": 0.5, "rank_multiple": 2}, 2),
        ({"residual_tol": 0.05, "rank_multiple": 2}, 4),
        ({"residual_tol": 0.001, "rank_max": 2}, 2),
        ({"residual_tol": 0.5, "rank_min": 6}, 4),  # no more directions than the gradient has
    ],
    ids=str,
)
def test_the_rank_is_the_smallest_that_leaves_little_enough(options, rank):
    dense = DenseAdaRankGrad(zeros(12, 8), **options)
    dense.step(matrix_with([8.0, 4.0, 2.0, 1.0]))
    assert dense.rank == rank


def test_the_rank_shrinks_as_the_gradient_does_and_may_be_kept_from_growing():
    ranks = {}
    for never_grow in (False, True):
        dense = DenseAdaRankGrad(zeros(12, 8), residual_tol=1e-3, update_proj_gap=1, never_grow=never_grow)
        ranks[never_grow] = []
        for k in (4, 2, 3):
            dense.step(matrix_with([1.0] * k))
            ranks[never_grow].append(dense.rank)
    assert ranks == {False: [4, 2, 3], True: [4, 2, 2]}


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_a_basis_turned_within_its_span_leaves_the_lifted_first_moment_alone(shape):
    """Gradients of one span: then Q_new = Q_old O, and the lifted moment is Adam's of the unprojected gradient."""
    rows = positive_qr(gaussian(8, 3))
    dense = DenseAdaRankGrad(zeros(*shape), residual_tol=0.0, update_proj_gap=1, second_moment="squared")
    first, energy, bases = zeros(12, 8), 0.0, []
    for step in range(4):
        H = gaussian(12, 3, seed=10 + step) @ rows.T
        dense.step(H if dense.right else H.T)
        bases.append(dense.basis)
        first, energy = 0.9 * first + 0.1 * H, 0.999 * energy + 0.001 * H.square().sum()
        assert close(dense.adam.M @ dense.basis.T, first)
        assert close(dense.adam.V.sum(), energy)  # squares of an orthogonal matrix have rows and columns of sum one
    assert (bases[1].T @ bases[0] - torch.eye(3, dtype=torch.float64)).norm() > 0.1


def test_the_basis_is_continuous_where_singular_vectors_are_not():
    """Equal singular values: a perturbation of 1e-8 turns the vectors at will, but not the basis."""
    bases, vectors = [], []
    for seed in (5, 6):
        gradient = matrix_with([1.0, 1.0, 1.0]) + 1e-8 * gaussian(12, 8, seed=seed)
        dense = DenseAdaRankGrad(zeros(12, 8), rank_max=5, residual_tol=1e-3)
        dense.step(gradient)
        bases.append(dense.basis)
        vectors.append(torch.linalg.svd(gradient).Vh[:3].T)
    assert close(*bases, 1e-6)
    assert not close(*vectors, 0.1)


@pytest.mark.parametrize("second_moment", ["abs", "clamp", "squared"])
def test_no_second_moment_is_negative(second_moment):
    dense = DenseAdaRankGrad(zeros(12, 8), update_proj_gap=1, second_moment=second_moment)
    for step in range(6):
        dense.step(gaussian(12, 8, seed=step))
        assert (dense.adam.V >= 0).all()
    assert dense.weight.isfinite().all()


def test_a_subspace_lasts_until_its_gradient_is_small_or_it_is_old():
    dense = DenseAdaRankGrad(zeros(12, 8), update_proj_gap=3, grad_norm_tol=1e-4)
    found = []
    for factor in (1.0, 1.0, 1.0, 1.0, 1e-5, 1.0, 0.0, 0.0, 1.0):
        dense.step(factor * gaussian(12, 8))
        found.append((dense.refreshes, dense.age, dense.converged))
    assert found == [
        (1, 1, False),
        (1, 2, False),
        (1, 3, False),
        (2, 1, False),  # three steps old
        (2, 2, True),
        (3, 1, False),  # the last gradient was small
        (3, 2, True),
        (3, 3, True),  # due, but no subspace can be read off a zero gradient
        (4, 1, False),
    ]


# APOLLO


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_the_first_step_does_not_see_a_factor_on_the_gradient(shape, mini):
    weights = [zeros(*shape), zeros(*shape)]
    for factor, weight in zip((1.0, 1e-3), weights, strict=True):
        DenseApollo(weight, rank=3, mini=mini, eps=NEGLIGIBLE).step(factor * gaussian(*shape))
    assert close(*weights)


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_a_step_only_scales_channels_of_the_gradient(shape):
    """Adam's first direction is of signs: a channel's scale is √r over the norm of its projection."""
    weight, gradient = zeros(*shape), gaussian(*shape)
    dense = DenseApollo(weight, rank=3, lr=1.0, eps=NEGLIGIBLE)
    dense.step(gradient)
    W, H = (weight, gradient) if dense.right else (weight.T, gradient.T)
    channel = (W * H).sum(1, keepdim=True) / H.square().sum(1, keepdim=True)
    assert (channel < 0).all()
    assert close(channel * H, W)
    assert channel.std() > 0.1  # not one scale for all


@pytest.mark.parametrize("shape", SIDES.values(), ids=SIDES)
def test_minis_step_is_parallel_to_the_gradient(shape):
    weight = zeros(*shape)
    dense = DenseApollo(weight, mini=True, lr=1.0, norm_growth_limit=None)
    for step in range(3):
        gradient, before = gaussian(*shape, seed=step), weight.clone()
        dense.step(gradient)
        moved = before - weight
        assert close(moved, moved.norm() * gradient / gradient.norm())
    assert (dense.rank, dense.scale) == (1, 128**0.5)


def test_the_limiter_bounds_the_growth_of_the_step():
    def sizes(limit):
        weight = zeros(12, 8)
        dense, norms = DenseApollo(weight, rank=3, lr=1.0, norm_growth_limit=limit), []
        for step in range(8):
            before = weight.clone()
            dense.step((-1.0) ** min(step, 2) * gaussian(12, 8))  # one turn back, after which the steps pick up again
            norms.append((weight - before).norm())
        return torch.stack(norms)

    free, bounded = sizes(None), sizes(1.01)
    growth = bounded[1:] / bounded[:-1]
    assert (free[1:] / free[:-1]).max() > 5
    assert growth.max().item() == pytest.approx(1.01, rel=1e-9)
    assert close(bounded[0], free[0])
