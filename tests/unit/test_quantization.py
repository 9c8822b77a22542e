"""How moments are stored in eight and sixteen bits: the codes, their rounding, and what an average makes of them."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from ds_lowrank.linalg import quantization
from ds_lowrank.linalg.dither import dither, dither_terms, offsets
from ds_lowrank.linalg.quantization import BLOCK, FP32, BFloat16, Int8

CPU = torch.device("cpu")
CODES = {"signed": Int8(signed=True), "unsigned": Int8(signed=False), "bf16": BFloat16()}
SPACING = {"signed": 1 / 8, "unsigned": 1 / 8, "bf16": 2**-7}
"""How far apart two neighbours are, at most, relative to the smaller one."""


def values(name, rows=150, columns=5, seed=0):
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return drawn.square() if name == "unsigned" else drawn


def offset(step):
    return offsets([1234567], step, CPU)


def dither_of_step(rows, columns, step):
    return dither(*dither_terms(0, rows, columns, offset(step)))[0]


def empty(code, count, rows, columns):
    return {key: torch.empty(count, *s, dtype=t) for key, (s, t) in code.tensors(rows, columns).items()}


def encode(code, stack, first, matrix_offsets):
    out = empty(code, *stack.shape)
    code.encode(stack, first, matrix_offsets, out)
    return out


def stored(name, value, step=0):
    code = CODES[name]
    return code.decode(encode(code, value.unsqueeze(0), 0, offset(step)))[0]


@pytest.mark.parametrize("name", CODES)
def test_a_number_goes_to_one_of_its_neighbours(name):
    value = values(name)
    error = (stored(name, value) - value).abs() / value.abs()
    assert error.max() < SPACING[name]


@pytest.mark.parametrize("name", CODES)
def test_the_mean_over_steps_is_the_number(name):
    """Of n roundings the mean is off by at most half a gap over the root of n, four times that for the worst of 750."""
    value, steps = values(name), 1000
    mean = sum(stored(name, value, step).double() for step in range(steps)) / steps
    assert ((mean - value) / value).abs().max() < 4 * 0.5 * SPACING[name] / steps**0.5


@pytest.mark.parametrize("name", CODES)
def test_what_is_stored_once_stays(name):
    """A moment that does not move must not wander, whatever its neighbours do: codes stand for the same numbers."""
    value = stored(name, values(name))
    for step in range(1, 20):
        louder = value.clone()
        louder[0] *= 4
        again = stored(name, louder, step)[1:]
        assert torch.equal(again, value[1:])


@pytest.mark.parametrize("name", CODES)
def test_an_average_that_moves_less_than_a_code_a_step_still_arrives(name):
    """V <- 0.999 V + 0.001 g for a constant g: rounding to the nearest would never leave where it began.

    Each number is a random walk between codes, pulled back by a thousandth a step. Within a thousand steps it forgets;
    of the last five thousand its mean is that of five, each off by about half a gap. Columns are coded apart: every
    four have a goal of their own.
    """
    goals = [0.5, 0.53, 0.93]
    goal = torch.tensor(goals).repeat_interleave(4)
    average, total = stored(name, torch.full((BLOCK, len(goal)), 1.0)), 0.0
    for step in range(10000):
        average = stored(name, average + 0.001 * (goal - average), step)
        total = total + average.view(BLOCK, len(goals), 4).mean((0, 2)).double() * (step >= 5000) / 5000
    assert total.tolist() == pytest.approx(goals, rel=SPACING[name] / 5**0.5)


def test_a_direction_from_moments_of_eight_bits_hardly_turns():
    """The numbers that docs/methods.md gives, after as many steps as the averages remember."""
    generator = torch.Generator().manual_seed(0)
    first = first_exact = second = second_exact = torch.zeros(128, 8)
    for step in range(3000):
        gradient = torch.randn(128, 8, generator=generator) + 1
        first_exact = first_exact.lerp(gradient, 0.1)
        second_exact = second_exact.lerp(gradient.square(), 0.001)
        first = stored("signed", first.lerp(gradient, 0.1), step)
        second = stored("unsigned", second.lerp(gradient.square(), 0.001), step)
    assert ((first - first_exact) / first_exact.mean()).std() == pytest.approx(0.1, abs=0.03)
    assert (second / second_exact).sqrt().std() == pytest.approx(0.1, abs=0.03)
    assert (second / second_exact).sqrt().mean() == pytest.approx(1, abs=0.02)
    direction, exact = first / second.sqrt(), first_exact / second_exact.sqrt()
    assert torch.nn.functional.cosine_similarity(direction.flatten(), exact.flatten(), dim=0) > 0.985


def by_the_definition(value, signed, fraction):
    """The code of one block of one column, number by number."""
    octaves, top = (16, 127) if signed else (32, 255)
    largest = max(abs(v) for v in value)
    scale = 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    scale = max(2 * scale if largest > 1.875 * scale else scale, 2.0 ** (octaves - 127))
    numbers = [
        0.0,
        *(scale * 2.0 ** (code // 8 - octaves + 1) * (1 + code % 8 / 8) for code in range(1, top + 1)),
    ]
    codes = []
    for v, f in zip(value, fraction, strict=True):
        below = max(code for code in range(top + 1) if numbers[code] <= abs(v))
        above = min(below + 1, top)
        gap = numbers[above] - numbers[below]
        share = (abs(v) - numbers[below]) / gap if gap else 0.0
        if not signed and below == 0 and v > 0:
            share = 1.0
        codes.append((above if share + f >= 1 else below) | (128 if v < 0 else 0))
    return codes, scale


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_as_defined(signed):
    """A share is compared with 20 bits of the fraction: in a million numbers one may be decided otherwise."""
    name = "signed" if signed else "unsigned"
    value = values(name, rows=150, columns=3) ** 5
    value[10:20, 1] = 0
    value[64:128, 2] = 0
    code = CODES[name]
    found = {key: tensor[0] for key, tensor in encode(code, value.unsqueeze(0), 0, offset(7)).items()}
    fraction = dither_of_step(150, 3, 7) / 2**24
    assert found[""].dtype == torch.uint8 and found["_scale"].shape == (3, 3)
    for block in range(3):
        rows = slice(64 * block, min(64 * block + 64, 150))
        for column in range(3):
            codes, scale = by_the_definition(value[rows, column].tolist(), signed, fraction[rows, column].tolist())
            assert codes == found[""][rows, column].tolist()
            assert found["_scale"][block, column].item() == scale


@pytest.mark.parametrize("name", CODES)
def test_a_tensor_coded_in_chunks_and_in_pieces_is_coded_the_same(name):
    value, code = values(name, rows=1000, columns=7).unsqueeze(0), CODES[name]
    whole = encode(code, value, 0, offset(1))
    pieces = [encode(code, value[:, start:end], start, offset(1)) for start, end in ((0, 64), (64, 640), (640, 1000))]
    assert all(torch.equal(torch.cat([piece[key] for piece in pieces], 1), whole[key]) for key in whole)
    decoded = code.decode(whole)
    with mock.patch.object(quantization, "CPU_CHUNK_ELEMENTS", 64 * 7 * 3):
        chunked = encode(code, value, 0, offset(1))
        assert all(torch.equal(chunked[key], whole[key]) for key in whole)
        assert torch.equal(code.decode(whole), decoded)


def test_a_small_second_moment_never_becomes_zero_and_a_zero_stays_one():
    value = torch.tensor([[1.0], [1e-30], [0.0], [1e-7]])
    once = stored("unsigned", value)
    assert (once[1] > 0).all() and once[2] == 0
    assert stored("signed", torch.tensor([[1.0], [-1e-30]]), 0)[1] == 0


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("scale", [1e-28, 1e-20, 1e20, 1e37])
def test_extreme_sizes_stay_finite(name, scale):
    value = values(name) * scale
    once = stored(name, value)
    assert once.isfinite().all()
    assert (once - value).double().norm() < SPACING[name] * value.double().norm()


@pytest.mark.parametrize("shape", [(1, 0, 4), (0, 70, 4), (2, 70, 0)])
def test_tensors_without_elements_are_ordinary(shape):
    for code in (*CODES.values(), FP32):
        out = encode(code, torch.empty(shape), 0, offset(0).expand(shape[0]))
        assert code.decode(out).shape == shape


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_bytes_are_little_more_than_a_quarter(name):
    assert CODES[name].nbytes(4096, 128) == 4096 * 128 + 64 * 128 * 4
    assert CODES[name].nbytes(4096, 128) / FP32.nbytes(4096, 128) < 0.27


def test_what_decides_is_evenly_spread_over_rows_and_over_columns():
    def found(first, rows, columns):
        return dither(*dither_terms(first, rows, columns, torch.tensor([77], dtype=torch.int32)))[0]

    for line in (found(0, 5000, 1), found(0, 1, 5000)):
        even = (torch.arange(5000) + 0.5) / 5000
        assert (line.flatten().sort().values / 2**24 - even).abs().max() < 2e-3  # chance would leave 1e-2
    assert torch.equal(found(7, 2, 4), found(0, 20, 4)[7:9])
    assert torch.equal(found(2**33 + 7, 2, 4), found(2**33, 20, 4)[7:9])
