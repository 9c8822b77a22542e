"""How moments are stored in eight and sixteen bits: the codes, their rounding, and what an average makes of them."""

import math

import numpy
import pytest
import torch

from ds_lowrank.linalg.codes import BLOCK, EXACT, BFloat16, Logarithmic, fractions

CODES = {"signed": Logarithmic(signed=True), "unsigned": Logarithmic(signed=False), "bf16": BFloat16()}
SPACING = {"signed": 2 ** (1 / 8) - 1, "unsigned": 2 ** (1 / 11) - 1, "bf16": 2**-7}
"""How far apart two neighbours are, at most, relative to the smaller one."""


def values(name, rows=150, columns=5, seed=0):
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return drawn.square() if name == "unsigned" else drawn


def dither(rows, columns, step):
    return lambda: fractions(torch.arange(rows), columns, step, salt=3)


def stored(name, value, step=0):
    code = CODES[name]
    return code.decode(code.encode(value, dither(*value.shape, step)))


@pytest.mark.parametrize("name", CODES)
def test_a_number_goes_to_one_of_its_neighbours(name):
    value = values(name)
    error = (stored(name, value) - value).abs() / value.abs()
    assert error.max() < SPACING[name]


@pytest.mark.parametrize("name", CODES)
def test_the_mean_over_steps_is_the_number(name):
    """An additive sequence of n steps fills the interval to about 1 / n; chance would to 1 / sqrt(n)."""
    value, steps = values(name), 1000
    mean = sum(stored(name, value, step).double() for step in range(steps)) / steps
    assert ((mean - value) / value).abs().max() < 10 * SPACING[name] / steps


@pytest.mark.parametrize("name", CODES)
def test_what_is_stored_once_stays(name):
    """A moment that does not move must not wander, whatever its neighbours do: the grid is the same for every scale.

    Powers are good to 1e-7, and a share of 1e-7 / 0.065 of a step down is taken as rarely as that.
    """
    value = stored(name, values(name))
    for step in range(1, 20):
        louder = value.clone()
        louder[0] *= 4
        again = stored(name, louder, step)[1:]
        assert ((again - value[1:]).abs() <= 1e-6 * value[1:].abs()).all()


@pytest.mark.parametrize("name", CODES)
def test_an_average_that_moves_less_than_a_code_a_step_still_arrives(name):
    """V <- 0.999 V + 0.001 g for a constant g: rounding to the nearest would never leave where it began."""
    start, goal = 1.0, 0.5
    average = stored(name, torch.full((BLOCK, 4), start))
    for step in range(3000):
        average = stored(name, average + 0.001 * (goal - average), step)
    expected = goal + (start - goal) * 0.999**3000
    assert average.mean().item() == pytest.approx(expected, rel=0.02)
    # Each number is a random walk between neighbours that is pulled back by a thousandth a step.
    assert average.std().item() < 4 * SPACING[name] * expected


def by_the_definition(value, signed, fraction):
    """The code of one block of one column, number by number in double precision."""
    per_octave, top = (8, 127) if signed else (11, 255)
    largest = max(abs(v) for v in value)
    scale = 2 ** (math.ceil(math.log2(largest) * per_octave - 1e-3) / per_octave) if largest else 1.0
    powers = [0.0, *(2 ** ((code - top) / per_octave) for code in range(1, top + 1))]
    codes = []
    for v, f in zip(value, fraction, strict=True):
        relative = abs(v) / scale
        below = max(code for code in range(top + 1) if powers[code] <= relative * (1 + 1e-4))
        above = min(below + 1, top)
        gap = powers[above] - powers[below]
        share = (relative - powers[below]) / gap if gap else 0.0
        if not signed and below == 0 and relative > 0:
            share = 1.0
        code = above if share > f else below
        codes.append(code | (128 if v < 0 else 0))
    return codes, scale


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_as_defined(signed):
    """Next to a boundary double precision may decide otherwise: in fewer than one number of a thousand."""
    name = "signed" if signed else "unsigned"
    value = values(name, rows=150, columns=3) ** 5
    value[10:20, 1] = 0
    value[64:128, 2] = 0
    code = CODES[name]
    found = code.encode(value, dither(150, 3, 7))
    fraction = dither(150, 3, 7)()
    assert found[""].dtype == torch.uint8 and found["_scale"].shape == (3, 3)
    differing = 0
    for block in range(3):
        rows = slice(64 * block, min(64 * block + 64, 150))
        for column in range(3):
            codes, scale = by_the_definition(value[rows, column].tolist(), signed, fraction[rows, column].tolist())
            differing += int((numpy.array(codes) != found[""][rows, column].numpy()).sum())
            assert found["_scale"][block, column].item() == pytest.approx(scale, rel=1e-6)
    assert differing < 1


def test_a_small_second_moment_never_becomes_zero_and_a_zero_stays_one():
    value = torch.tensor([[1.0], [1e-30], [0.0], [1e-7]])
    once = stored("unsigned", value)
    assert (once[1] > 0).all() and once[2] == 0
    assert stored("signed", torch.tensor([[1.0], [-1e-30]]), 0)[1] == 0


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e37])
def test_extreme_sizes_stay_finite(name, scale):
    value = values(name) * scale
    once = stored(name, value)
    assert once.isfinite().all()
    assert (once - value).double().norm() < SPACING[name] * value.double().norm()


def test_tensors_without_rows_are_ordinary():
    for code in (*CODES.values(), EXACT):
        empty = code.encode(torch.empty(0, 4), dither(0, 4, 0))
        assert {key: tuple(t.shape) for key, t in empty.items()} == {
            key: s for key, (s, _) in code.tensors(0, 4).items()
        }
        assert code.decode(empty).shape == (0, 4)


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_bytes_are_little_more_than_a_quarter(name):
    assert CODES[name].nbytes(4096, 128) == 4096 * 128 + 64 * 128 * 4
    assert CODES[name].nbytes(4096, 128) / EXACT.nbytes(4096, 128) < 0.27


def test_fractions_fill_the_interval_evenly_over_rows_columns_and_steps():
    over_rows = fractions(torch.arange(5000), 1, 0, 0).flatten()
    over_columns = fractions(torch.arange(1), 5000, 0, 0).flatten()
    over_steps = torch.cat([fractions(torch.arange(1), 1, step, 0).flatten() for step in range(5000)])
    for found in (over_rows, over_columns, over_steps):
        even = (torch.arange(5000) + 0.5) / 5000
        assert (found.sort().values - even).abs().max() < 2e-3  # chance would leave 1e-2
    assert torch.equal(fractions(torch.arange(7, 9), 4, 5, 6), fractions(torch.arange(20), 4, 5, 6)[7:9])
