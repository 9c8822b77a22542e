"""Random matrices: the generator's published words, the definition, any part alone, and their statistics."""

import math

import pytest
import torch

from ds_lowrank.linalg import sketch
from ds_lowrank.linalg.philox import philox
from ds_lowrank.linalg.sketch import name_hash, normal, signs
from ds_lowrank.reference.sketch import sign_sketch
from ds_lowrank.reference.sketch import sketch as reference

CPU = torch.device("cpu")
ROUNDING = torch.finfo(torch.float32).eps
ALL_ONES = 0xFFFFFFFF
NAMES = ["a.weight", "b.weight", "c.weight"]

# "philox4x32 10" in Random123's tests/kat_vectors: counter, key, words.
KNOWN = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def literal_philox(counter, key):
    """Philox4x32-10 in Python's unbounded integers, as section 4.3 of the paper writes a round."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def tensors(words):
    return tuple(torch.tensor(word) for word in words)


@pytest.mark.parametrize("case", KNOWN)
def test_words_are_the_published_ones(case):
    counter, key, words = KNOWN[case]
    assert literal_philox(counter, key) == words
    assert tuple(int(word) for word in philox(tensors(counter), tensors(key))) == words
    assert tuple(int(word) for word in philox(counter, tensors(key))) == words


def test_words_of_tensors_that_broadcast_are_those_of_each_combination():
    """Also of words above 2**31, whose products leave int64."""
    block, row = torch.tensor([0, 1, 2**31, ALL_ONES]), torch.tensor([[0], [7], [ALL_ONES - 1]])
    keys = torch.tensor([5, ALL_ONES])[:, None, None], torch.tensor([2**31, 9])[:, None, None]
    words = torch.stack(philox((block, row, 0, 0), keys), -1)
    assert words.shape == (2, 3, 4, 4)
    for k, r, b in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        key = keys[0][k].item(), keys[1][k].item()
        assert tuple(words[k, r, b].tolist()) == literal_philox((block[b].item(), row[r].item(), 0, 0), key)


def near(drawn, exact):
    """Whether fp32 rounded the functions and products of exact arguments as well as it should.

    In half units in the last place: the logarithm 2, halved by the root, the root itself 1, cosine or sine 2, the
    product 1, the exact number, if that is fp32, 1. That is 6, and 4 units are 8. The worst of 24 million was 2 units.
    """
    return ((drawn - exact).abs() <= 4 * ROUNDING * exact.abs()).all()


def test_elements_are_those_of_the_definition():
    rows, columns = (2**31 + 3, 2**31 + 6), (2**33 - 3, 2**33 + 6)
    normals, ones = (draw(7, NAMES, "3 probe", rows, columns, CPU) for draw in (normal, signs))
    for k, name in enumerate(NAMES):
        key = name_hash(7, name, "3 probe")
        for r, row in enumerate(range(*rows)):
            for c, column in enumerate(range(*columns)):
                words = literal_philox((column // 4, row, 0, 0), (key % 2**32, key >> 32))
                first = column % 4 // 2 * 2
                u0, u1 = (torch.tensor(words[first : first + 2]).float() + 0.5) * 2**-32
                circular = torch.sin if column % 2 else torch.cos
                exact = (-2 * u0.double().log()).sqrt() * circular((2 * math.pi * u1).double())
                assert near(normals[k, r, c], exact)
                assert ones[k, r, c] == (1 if words[column % 4] >= 2**31 else -1)


@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (2, 4001), (300, 128)])
@pytest.mark.parametrize("counter", [0, "5 probe 0.1"])
def test_reference_draws_the_same(shape, counter):
    part = (0, shape[0]), (0, shape[1])
    assert near(normal(3, ["a.weight"], counter, *part, CPU)[0], reference(3, "a.weight", counter, *shape))
    assert torch.equal(signs(3, ["a.weight"], counter, *part, CPU)[0], sign_sketch(3, "a.weight", counter, *shape))


@pytest.mark.parametrize("lanes", [4, 100, sketch.LANES])
@pytest.mark.parametrize("draw", [normal, signs])
def test_any_part_has_the_bits_of_the_whole(draw, lanes, monkeypatch):
    """Tiles of any size cut the vectors of the processor anywhere."""
    whole = draw(1, NAMES, 5, (0, 23), (0, 50), CPU)
    monkeypatch.setattr(sketch, "LANES", lanes)
    for rows in ((0, 23), (4, 5), (7, 20), (22, 23), (3, 3)):
        for columns in ((0, 50), (0, 3), (1, 3), (3, 4), (4, 8), (5, 47), (7, 9), (49, 50), (50, 50)):
            for chosen in ([0, 1, 2], [2, 0], [1], []):
                part = draw(1, [NAMES[i] for i in chosen], 5, rows, columns, CPU)
                expected = whole[chosen, slice(*rows), slice(*columns)]
                assert part.dtype == torch.float32 and part.is_contiguous()
                assert torch.equal(part, expected)


@pytest.mark.parametrize("draw", [normal, signs])
def test_matrices_are_functions_of_seed_name_and_counter(draw):
    base = draw(1, ["a.weight"], 5, (0, 6), (0, 30), CPU)
    assert torch.equal(base, draw(1, ["b", "a.weight"], 5, (0, 6), (0, 30), CPU)[1:])
    for seed, name, counter in ((2, "a.weight", 5), (1, "b", 5), (1, "a.weight", 6), (1, "a.weight", "5 probe")):
        assert not torch.equal(base, draw(seed, [name], counter, (0, 6), (0, 30), CPU))


@pytest.mark.parametrize("shape", [(1, 300, 1000), (3, 2, 4 * sketch.LANES), (3000, 4, 30), (1, 1, 8 * sketch.LANES)])
def test_the_generator_never_works_on_more_than_a_tile(shape, monkeypatch):
    """So a draw needs a few MiB beside its result, whichever of its sizes is large."""
    called = []

    def counted(counter, key):
        words = philox(counter, key)
        called.append(words[0].numel())
        return words

    monkeypatch.setattr(sketch, "philox", counted)
    names, rows, columns = shape
    assert normal(0, [str(i) for i in range(names)], 0, (0, rows), (0, columns), CPU).shape == shape
    assert max(called) <= sketch.LANES
    assert sum(called) == names * rows * -(-columns // 4)
    assert len(called) <= 2 * sum(called) / sketch.LANES + 1  # and the tiles are not small


def draws(draw):
    """Two seeds, two counters, two names, 256 rows, 512 columns: a million elements."""
    each = [[draw(seed, NAMES[:2], counter, (0, 256), (0, 512), CPU) for counter in (0, 1)] for seed in (0, 1)]
    return torch.stack([torch.stack(inner) for inner in each]).double()


def within(samples, expected, variance, sigmas=5):
    """Whether a mean of independent samples is as near as five standard errors; one normal number in two million isn't.

    The seeds are fixed, so this either always holds or never.
    """
    return abs(samples.mean().item() - expected) <= sigmas * math.sqrt(variance / samples.numel())


def test_normal_elements_have_the_moments_of_a_normal_distribution():
    """The variance of z^k is E z^2k - (E z^k)^2; E z^2, z^4, z^6, z^8 are 1, 3, 15, 105."""
    z = draws(normal)
    assert within(z, 0, 1)
    assert within(z**2, 1, 2)
    assert within(z**3, 0, 15)
    assert within(z**4, 3, 96)
    for bound in (0.5, 1, 2, 3):
        share = math.erfc(bound / math.sqrt(2))
        assert within((z.abs() > bound).double(), share, share * (1 - share))
    for i in range(4):  # each place in a block
        assert within(z[..., i::4], 0, 1) and within(z[..., i::4] ** 2, 1, 2)


def test_signs_are_balanced():
    for i in range(4):
        assert within(draws(signs)[..., i::4], 0, 1)


@pytest.mark.parametrize("draw", [normal, signs])
@pytest.mark.parametrize("axis", ["seed", "counter", "name", "row", "column"])
def test_neighbours_are_uncorrelated(draw, axis):
    """Also their squares: the two normal numbers of a pair share a radius, and would show it there."""
    z = draws(draw)
    dimension = ["seed", "counter", "name", "row", "column"].index(axis)
    for distance in range(1, 2 if dimension < 3 else 9):
        a, b = z.narrow(dimension, distance, z.shape[dimension] - distance), z
        b = b.narrow(dimension, 0, a.shape[dimension])
        assert within(a * b, 0, 1)
        if draw is normal:
            assert within((a**2 - 1) * (b**2 - 1), 0, 4)


def test_a_matrix_is_not_like_its_transpose():
    square = draws(normal)[..., :256].flatten(0, -3)
    below = torch.ones(256, 256, dtype=torch.bool).tril(-1)
    assert within((square * square.mT)[:, below], 0, 1)
