"""Functions of a stack of matrices give each what it would get alone, whatever its neighbours are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.linalg.energy import leading_coordinates, numerical_rank, singular_pairs, smallest_rank, spectrum
from ds_lowrank.linalg.moments import adam, rotate_first, rotate_second
from ds_lowrank.linalg.orthonormal import (
    RANK_TOLERANCE,
    _by_gram_matrix,
    _by_householder,
    leading_singular_vectors,
    orthonormal,
)

TALL = {"count": st.integers(1, 4), "p": st.integers(1, 30), "k": st.integers(1, 8), "seed": st.integers(0, 2**32)}
ROUNDING = torch.finfo(torch.float32).eps


def tall_stack(count, p, k, seed):
    """Matrices of very different sizes, every second one with a dependent column and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(count, p + k, k, generator=generator)
    stack[::2, :, -1] = 2 * stack[::2, :, 0]
    stack[::2, 0] = 0
    return stack * 10.0 ** torch.arange(-20, -20 + 10 * count, 10).view(-1, 1, 1)


@settings(max_examples=60, deadline=None)
@given(**TALL)
def test_singular_pairs_of_a_stack_rebuild_its_matrices(count, p, k, seed):
    """``A V = F S``, with a zero column in F and V for a direction that is rounding."""
    stack = tall_stack(count, p, k, seed)
    for left, right, matrix in zip(*singular_pairs(stack), stack, strict=True):
        values = torch.linalg.svdvals(matrix.double())
        live = values > RANK_TOLERANCE * values[0]
        size = values[0].float()
        assert torch.allclose(matrix @ right / size, left * values.float() / size, atol=1e-5)
        for vectors in (left, right):
            assert torch.allclose(vectors.T @ vectors, torch.diag(live.float()), atol=1e-5)
        largest = right.gather(0, right.abs().argmax(0, keepdim=True)).squeeze(0)
        assert (largest[live] > 0).all()
        assert not left[(matrix == 0).all(1)].any()


@settings(max_examples=60, deadline=None)
@given(**TALL)
def test_bases_of_a_stack_are_those_of_its_matrices(count, p, k, seed):
    stack = tall_stack(count, p, k, seed)
    for found, matrix in zip(orthonormal(stack), stack, strict=True):
        assert torch.allclose(found, orthonormal(matrix), atol=10 * ROUNDING)
        norms = found.norm(dim=0)
        assert ((norms == 0) | ((norms - 1).abs() < 1e-5)).all()
        assert not found[(matrix == 0).all(1)].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_spoils_only_its_own_results(bad):
    stack = tall_stack(3, 9, 4, seed=0)
    clean = stack.clone()
    stack[1, 2, 3] = bad
    fine = [0, 2]
    for function in (
        orthonormal,
        lambda s: spectrum(s)[0],
        lambda s: singular_pairs(s)[0],
        lambda s: leading_singular_vectors(s, 2, "right"),
    ):
        found, expected = function(stack), function(clean)
        assert torch.allclose(found[fine], expected[fine], atol=10 * ROUNDING)
        assert found[1].isnan().all()
    vectors = spectrum(stack)[1]
    assert vectors[1].isnan().all() and vectors[fine].isfinite().all()
    coordinates = leading_coordinates(vectors, torch.tensor([2, 2, 2]))
    assert coordinates[fine].isfinite().all() and coordinates[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 6, 3), (4, 0, 3)])
def test_stacks_without_elements_are_returned(shape):
    assert orthonormal(torch.empty(shape)).shape == shape
    assert leading_singular_vectors(torch.empty(shape), 2, "left").shape == (shape[0], 0, 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_singular_vectors_of_a_stack_are_those_of_its_matrices(side):
    stack = tall_stack(3, 5, 6, seed=1)
    found = leading_singular_vectors(stack, 4, side)
    assert torch.equal(found, torch.stack([leading_singular_vectors(matrix, 4, side) for matrix in stack]))


@settings(max_examples=60, deadline=None)
@given(**TALL, tolerance=st.sampled_from([1e-9, 0.01, 0.2, 0.6]))
def test_ranks_of_a_stack_follow_from_each_spectrum(count, p, k, seed, tolerance):
    stack = tall_stack(count, p, k, seed)
    whole = stack.double().square().sum((1, 2)) * 1.1
    values, vectors = spectrum(stack)
    ranks, numerical = smallest_rank(values, whole, tolerance), numerical_rank(values)
    assert ranks.dtype == numerical.dtype == torch.int64
    for i, matrix in enumerate(stack.double()):
        exact = torch.linalg.svdvals(matrix)
        assert torch.allclose(values[i], exact, rtol=0, atol=100 * ROUNDING * exact[0].item())
        gram = vectors[i].T @ vectors[i]
        assert torch.allclose(gram, torch.eye(k, dtype=torch.float64), atol=1e-12)
        lengths = (matrix @ vectors[i]).norm(dim=0)
        assert torch.allclose(lengths, exact, rtol=0, atol=100 * ROUNDING * exact[0].item())
        left_out = [(whole[i] - values[i, :rank].square().sum()).item() for rank in range(1, k + 1)]
        share = max(tolerance, 1e-6) * whole[i].item()
        assert ranks[i] == next((rank for rank, rest in enumerate(left_out, 1) if rest <= share), k + 1)
        assert numerical[i] == sum(value > RANK_TOLERANCE * values[i, 0] for value in values[i])


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 4), k=st.integers(1, 8), data=st.data())
def test_coordinates_of_a_stack_span_the_leading_vectors_of_each(count, k, data):
    seed = data.draw(st.integers(0, 2**32))
    drawn = torch.randn(count, k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors = torch.linalg.qr(drawn).Q
    ranks = data.draw(st.lists(st.integers(1, k), min_size=count, max_size=count))
    found = leading_coordinates(vectors, torch.tensor(ranks))
    assert found.dtype == torch.float32
    for i, rank in enumerate(ranks):
        assert not found[i, :, rank:].any()
        leading = vectors[i, :, :rank]
        alone = orthonormal(leading @ leading[:rank].T).float()  # without the columns of zeros
        assert torch.allclose(found[i, :, :rank], alone, atol=10 * ROUNDING)
        outside = found[i, :, :rank].double() - leading @ (leading.T @ found[i, :, :rank].double())
        assert outside.abs().max() < 10 * ROUNDING


def test_matrices_whose_svd_does_not_converge_are_nan_and_the_others_are_not(monkeypatch):
    real = torch.linalg.svd
    stack = tall_stack(3, 5, 4, seed=0)
    expected = spectrum(stack)
    largest = expected[0][1, 0]

    def fails_for_one(matrices):
        if any((value - largest).abs() < 1e-6 * largest for value in real(matrices)[1][:, 0]):
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrices)

    monkeypatch.setattr(torch.linalg, "svd", fails_for_one)
    for found, clean in zip(spectrum(stack), expected, strict=True):
        assert found[1].isnan().all()
        assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_moments_of_a_stack_turn_and_step_as_those_of_its_matrices():
    torch.manual_seed(0)
    rotation = orthonormal(torch.randn(3, 4, 4))
    for rotate in (rotate_first, rotate_second):
        stack = torch.rand(3, 9, 4)
        alone = stack.clone()
        rotate(stack, rotation)
        for moment, own in zip(alone, rotation, strict=True):
            rotate(moment, own)
        assert torch.allclose(stack, alone, atol=10 * ROUNDING)
    gradient, first, second = torch.randn(3, 9, 4), torch.randn(3, 9, 4), torch.rand(3, 9, 4)
    each = [tensor.clone() for tensor in (first, second)]
    direction = adam(first, second, gradient, (0.9, 0.99), 1e-8, 5)
    alone = [adam(m, v, g, (0.9, 0.99), 1e-8, 5) for m, v, g in zip(*each, gradient, strict=True)]
    assert torch.allclose(direction, torch.stack(alone), rtol=10 * ROUNDING, atol=0)
    assert torch.allclose(first, each[0], atol=ROUNDING) and torch.allclose(second, each[1], atol=ROUNDING)


@pytest.mark.parametrize("decay", [1.0, 0.7, 0.3])
def test_the_decomposition_for_cards_is_the_one_by_reflections(decay):
    """Down to directions of 1e-4 the Gram matrix decides, below that reflections do: the same basis to rounding.

    A basis is as sensitive as its matrix's condition, here at most that of 0.3^7 until reflections take over.
    """
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(5, 40, 12, generator=generator) * decay ** torch.arange(12)
    stack[2, :, 3] = stack[2, :, 1]
    (q, diagonal), (expected, of_r) = _by_gram_matrix(stack), _by_householder(stack)
    independent = of_r.abs() > RANK_TOLERANCE * of_r.abs().amax(-1, keepdim=True)
    q, expected = q * diagonal.sign().unsqueeze(1), expected * of_r.sign().unsqueeze(1)
    apart = (q - expected).norm(dim=1)[independent]
    assert apart.max() < 12 * torch.finfo(torch.float32).eps / max(decay**11, 1e-4)
    assert torch.equal(independent[2, 3], torch.tensor(False))
