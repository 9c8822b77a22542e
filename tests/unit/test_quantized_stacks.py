"""A stack of matrices is stored as each of them alone would be, with as many operations as for one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ds_lowrank.linalg import quantization
from ds_lowrank.linalg.dither import offsets
from ds_lowrank.linalg.quantization import FP32
from tests.unit import plain_codes
from tests.unit.test_quantization import CODES, empty, encode

CPU = torch.device("cpu")
WITHOUT_SIGN = {"signed": False, "unsigned": True, "bf16": False}


def stack(name, count, rows, columns, seed=0, decades=0):
    """Numbers over many octaves, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, rows, columns, generator=generator) ** 5 * 10.0**decades
    drawn[torch.rand(count, rows, columns, generator=generator) < 0.1] = 0
    return drawn.abs() if WITHOUT_SIGN[name] else drawn


def alone(name, matrix, first, offset):
    if name == "bf16":
        return plain_codes.encode_bf16(matrix, first, offset)
    return plain_codes.encode_int8(matrix, first, offset, signed=name == "signed")


def drawn_offsets(count, seed=0):
    return torch.randint(0, 2**24, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@pytest.mark.parametrize("name", CODES)
@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 4),
    rows=st.integers(1, 200),
    columns=st.integers(1, 6),
    seed=st.integers(0, 2**32),
    decades=st.integers(-38, 37),
    chunk=st.sampled_from([1, 500, 2**17]),
)
def test_each_matrix_is_stored_bit_for_bit_as_alone(name, count, rows, columns, seed, decades, chunk):
    code, first = CODES[name], 64 * (seed % 1000)
    matrices, matrix_offsets = stack(name, count, rows, columns, seed, decades), drawn_offsets(count, seed)
    with mock.patch.object(quantization, "CPU_CHUNK_ELEMENTS", chunk):
        found = encode(code, matrices, first, matrix_offsets)
        decoded = code.decode(found)
    for i, matrix in enumerate(matrices):
        expected = alone(name, matrix, first, matrix_offsets[i].item())
        assert all(torch.equal(found[key][i], expected[key]) for key in expected)
        if name != "bf16":
            assert torch.equal(decoded[i], plain_codes.decode_int8(expected, signed=name == "signed"))


@pytest.mark.parametrize("name", CODES)
def test_a_stack_is_written_into_views(name):
    """Rows of a longer tensor, as a rank writes those of one of the ranges that it owns."""
    code = CODES[name]
    matrices, matrix_offsets = stack(name, 3, 128, 5), drawn_offsets(3)
    expected = encode(code, matrices, 64, matrix_offsets)
    longer = {key: tensor.zero_() for key, tensor in empty(code, 3, 320, 5).items()}
    views = {key: tensor[:, 64:192] if key == "" else tensor[:, 1:3] for key, tensor in longer.items()}
    code.encode(matrices, 64, matrix_offsets, views)
    assert all(torch.equal(views[key], expected[key]) for key in expected)
    assert torch.equal(code.decode(views), code.decode(expected))
    assert not longer[""][:, :64].any() and not longer[""][:, 192:].any()


def test_exact_moments_are_copied_unless_they_were_changed_in_place():
    matrices, target = stack("bf16", 2, 3, 4), torch.zeros(2, 3, 4)
    FP32.encode(matrices, 0, drawn_offsets(2), {"": target})
    assert torch.equal(target, matrices)
    assert FP32.decode({"": target}) is target
    FP32.encode(target, 0, drawn_offsets(2), {"": target})
    assert torch.equal(target, matrices)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800000])
def test_a_number_that_is_not_finite_stays_so_whatever_the_dither(name, bits):
    """CUDA's NaN has all bits set: a dither that is added to it could carry into the sign."""
    matrices = torch.ones(200, 64, 1)
    matrices.view(torch.int32)[:, 5] = bits
    decoded = CODES[name].decode(encode(CODES[name], matrices, 0, drawn_offsets(200)))
    assert not decoded[:, 5].isfinite().any()


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_matrices_do_not_share_scales(name):
    """With codes that reach over 16 or 32 octaves, small numbers next to large ones would be lost."""
    matrices = torch.ones(2, 64, 3)
    matrices[1] = 1e-25
    decoded = CODES[name].decode(encode(CODES[name], matrices, 0, drawn_offsets(2)))
    assert torch.allclose(decoded, matrices, rtol=1 / 8)


class Operations(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CODES)
def test_the_number_of_operations_does_not_depend_on_the_number_of_matrices(name):
    code, counts = CODES[name], []
    for count in (1, 224):
        matrices, matrix_offsets = stack(name, count, 16, 4), drawn_offsets(count)
        encode(code, matrices, 0, matrix_offsets)  # makes the tables of the dither
        with Operations() as operations:
            code.decode(encode(code, matrices, 0, matrix_offsets))
        counts.append(operations.count)
    assert counts[0] == counts[1] < 60


# What seeds the dither


def test_offsets_are_the_upper_bits_of_splitmix64():
    """The first three outputs of the published generator, seeded with 0."""
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [offsets([0], step, CPU).item() for step in (1, 2, 3)] == [output >> 40 for output in outputs]
    assert offsets([0], 1, CPU).dtype == torch.int32


def test_offsets_are_a_function_of_hash_and_step_alone():
    hashes = [5, 2**63 - 1, 0]
    found = offsets(hashes, 9, CPU)
    assert torch.equal(found, offsets(torch.tensor(hashes), 9, CPU))
    assert torch.equal(found, torch.cat([offsets([one], 9, CPU) for one in hashes]))
    assert offsets([], 3, CPU).shape == (0,)


STEPS = 4096
BINS = 64


def unevenness(numbers):
    """Chi squared of numbers below 2^24 in bins: of mean 63 and standard deviation sqrt(126) if they are uniform."""
    counts = torch.bincount(numbers >> 18, minlength=BINS)
    expected = len(numbers) / BINS
    return ((counts - expected).square() / expected).sum().item()


@pytest.mark.parametrize("hashes", [[0, 1, 2, 3], [2**62, 2**62 + 2**61, 2**63 - 1, 12345678901234567]])
def test_offsets_over_steps_are_uniform_and_independent_between_matrices(hashes):
    """The difference of two independent uniform numbers is uniform, too: between matrices and between steps.

    Five standard deviations: by chance one in a million of these few dozen would be as far off.
    """
    over_steps = torch.stack([offsets(hashes, step, CPU) for step in range(STEPS)]).long()
    uniform = [*over_steps.T, *(over_steps[lag:] - over_steps[:-lag] for lag in (1, 2, 7))]
    uniform += [over_steps[:, i] - over_steps[:, j] for i in range(len(hashes)) for j in range(i)]
    worst = max(unevenness((numbers % 2**24).flatten()) for numbers in uniform)
    assert worst < BINS - 1 + 5 * (2 * (BINS - 1)) ** 0.5
