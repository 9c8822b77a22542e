"""The pure functions under the methods."""

import pytest
import torch

from ds_lowrank.linalg.moments import adam, fused_adamw, rotate_first, rotate_second
from ds_lowrank.linalg.orthonormal import leading_singular_vectors, orthonormal
from ds_lowrank.linalg.sketch import name_hash, normal

CPU = torch.device("cpu")
ROUNDING = torch.finfo(torch.float32).eps


def matrix_with(singular_values, m=60, n=40):
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(m, len(singular_values), dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, len(singular_values), dtype=torch.float64))
    return (u * torch.tensor(singular_values, dtype=torch.float64)) @ v.T


def test_an_orthonormal_basis_spans_its_columns():
    torch.manual_seed(0)
    tall = torch.randn(50, 8)
    q = orthonormal(tall)
    assert torch.allclose(q.T @ q, torch.eye(8), atol=1e-6)
    assert torch.allclose(q @ (q.T @ tall), tall, atol=1e-5)


def test_its_signs_do_not_depend_on_the_factorisation():
    """Each column has a positive product with the one it came from, as in Gram-Schmidt."""
    torch.manual_seed(0)
    tall = torch.randn(50, 8)
    assert torch.equal(torch.sign((orthonormal(tall) * tall).sum(0)), torch.ones(8))


def test_a_dependent_column_becomes_zero_and_the_others_stay():
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 30)
    q = orthonormal(torch.stack([a, b, c, a - 2 * b + c], 1))
    assert torch.equal(q[:, 3], torch.zeros(30))
    assert torch.allclose(q[:, :3], orthonormal(torch.stack([a, b, c], 1)), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_does_not_matter(scale):
    torch.manual_seed(0)
    tall = torch.randn(20, 5)
    assert torch.allclose(orthonormal(tall * scale), orthonormal(tall), atol=1e-6)


def test_zero_nan_and_nothing():
    assert torch.equal(orthonormal(torch.zeros(6, 3)), torch.zeros(6, 3))
    assert orthonormal(torch.full((6, 3), torch.nan)).isnan().all()
    assert orthonormal(torch.empty(0, 3)).shape == (0, 3)
    assert leading_singular_vectors(torch.full((6, 4), torch.inf), 2, "right").isnan().all()
    assert leading_singular_vectors(torch.empty(0, 4), 2, "right").shape == (0, 2)
    assert torch.equal(leading_singular_vectors(torch.zeros(6, 4), 2, "left"), torch.zeros(6, 2))


def test_two_factorisations_find_weak_directions_to_a_rounding_error_and_one_does_not():
    """H^T (H sketch) with singular values from 1 to 1e-3, computed in fp32, against the same in fp64."""
    values = [10 ** (-3 * i / 7) for i in range(8)]
    exact = matrix_with(values)
    sketch = normal(0, ["w"], 0, (0, 40), (0, 8), CPU)[0]

    def both(h, s):
        return orthonormal(h.T @ orthonormal(h @ s))

    def one(h, s):
        return orthonormal(h.T @ (h @ s))

    truth = both(exact, sketch.double())
    weakest = 1 / values[-1]
    assert (both(exact.float(), sketch) - truth).norm(dim=0).max() < 10 * weakest * ROUNDING
    assert (one(exact.float(), sketch) - truth).norm(dim=0).max() > 100 * weakest * ROUNDING


@pytest.mark.parametrize("side", ["left", "right"])
def test_leading_singular_vectors_capture_the_most_energy(side):
    values = [5.0, 3.0, 2.0, 1.0, 0.5]
    matrix = matrix_with(values).float()
    q = leading_singular_vectors(matrix, 3, side)
    projected = matrix @ q if side == "right" else q.T @ matrix
    assert projected.norm().item() == pytest.approx((25 + 9 + 4) ** 0.5, rel=1e-5)


def test_vectors_beyond_the_rank_are_zero():
    q = leading_singular_vectors(matrix_with([2.0, 1.0]).float(), 4, "right")
    assert torch.equal(q[:, 2:], torch.zeros(40, 2))


def test_an_svd_that_does_not_converge_is_repeated_in_fp64(monkeypatch):
    real, seen = torch.linalg.svd, []

    def fails_in_fp32(matrix, **options):
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **options)

    matrix = matrix_with([3.0, 2.0, 1.0]).float()
    expected = leading_singular_vectors(matrix, 2, "left")
    monkeypatch.setattr(torch.linalg, "svd", fails_in_fp32)
    found = leading_singular_vectors(matrix, 2, "left")
    assert seen == [torch.float32, torch.float64]
    assert torch.allclose((found * expected).sum(0).abs(), torch.ones(2), atol=1e-5)


def test_adam_is_the_textbook_one():
    torch.manual_seed(0)
    m, v = torch.zeros(7, 3), torch.zeros(7, 3)
    first = second = 0
    for step in range(1, 5):
        g = torch.randn(7, 3)
        direction = adam(m, v, g, (0.8, 0.95), 1e-3, step)
        first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g**2
        expected = (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-3)
        assert torch.allclose(direction, expected, atol=1e-6)
        assert torch.allclose(m, first)
        assert torch.allclose(v, second)


def test_rotating_into_a_turned_basis_leaves_the_lifted_first_moment_alone():
    torch.manual_seed(0)
    old = orthonormal(torch.randn(12, 4))
    new = old @ orthonormal(torch.randn(4, 4))
    m, v = torch.randn(9, 4), torch.rand(9, 4)
    before, total = m @ old.T, v.sum()
    rotate_first(m, old.T @ new)
    rotate_second(v, old.T @ new)
    assert torch.allclose(m @ new.T, before, atol=1e-5)
    assert v.min() >= 0
    assert v.sum().item() == pytest.approx(total.item(), rel=1e-5)  # an orthogonal turn keeps the variance


def test_many_weights_are_stepped_each_with_its_own_count():
    """The step of a weight of zeros along -lr = 1 is Adam's direction, as of each weight alone."""
    torch.manual_seed(0)
    steps = [0, 3, 10]
    gradients = [torch.randn(5 + i) for i in steps]
    weights, firsts, seconds = ([torch.zeros_like(g) for g in gradients] for _ in range(3))
    fused_adamw(weights, gradients, firsts, seconds, steps, -1.0, (0.8, 0.95), 1e-3, weight_decay=0.0)
    for weight, gradient, step in zip(weights, gradients, steps, strict=True):
        alone = adam(torch.zeros_like(weight), torch.zeros_like(weight), gradient, (0.8, 0.95), 1e-3, step + 1)
        assert torch.allclose(weight, alone, atol=1e-6)


def test_sketches_are_functions_of_seed_name_and_counter():
    def draw(seed, name, counter):
        return normal(seed, [name], counter, (0, 6), (0, 3), CPU)

    base = draw(1, "a.weight", 5)
    assert torch.equal(base, draw(1, "a.weight", 5))
    others = [draw(2, "a.weight", 5), draw(1, "b", 5), draw(1, "a.weight", 6)]
    assert not any(torch.equal(base, other) for other in others)
    assert name_hash("stagger", "w") == 3237773512943864505  # checkpoints rely on it: a resumed run draws the same
