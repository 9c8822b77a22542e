"""What torch.compile makes of the quantizers' functions on a card, against the same functions as they are."""

from __future__ import annotations

import logging

import pytest
import torch

from ds_lowrank.linalg.dither import offsets
from ds_lowrank.linalg.quantization import BFloat16, Int8
from ds_lowrank.linalg.weight_rounding import column_words, round_to_bf16, rounding_keys, row_words

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CODES = {"signed": Int8(signed=True), "unsigned": Int8(signed=False), "bf16": BFloat16()}
SHAPES = [(3, 300, 5), (96, 512, 128), (1, 5000, 1)]  # a function is compiled anew for each of them, in seconds


def stack(name, shape):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 5
    return drawn.abs() if name == "unsigned" else drawn


def stored(code, matrices):
    count, rows, columns = matrices.shape
    like = code.tensors(rows, columns).items()
    out = {key: torch.empty(count, *s, dtype=t, device=matrices.device) for key, (s, t) in like}
    code.encode(matrices, 64, offsets(range(count), 3, matrices.device), out)
    return out


@pytest.fixture(autouse=True)
def nothing_failed_to_compile(caplog):
    with caplog.at_level(logging.WARNING, "ds_lowrank"):
        yield
    assert "torch.compile failed" not in caplog.text


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_on_a_card_are_those_of_the_cpu(name, shape):
    """A compiled division may differ in the last bit, which decides one of about 2^23 numbers below the lowest code."""
    matrices, code = stack(name, shape), CODES[name]
    on_cpu, on_cuda = stored(code, matrices), stored(code, matrices.to(CUDA))
    assert all(tensor.is_cuda for tensor in on_cuda.values())
    assert sum((on_cuda[key].cpu() != on_cpu[key]).sum().item() for key in on_cpu) <= matrices.numel() // 2**20 + 1
    moved = {key: tensor.to(CUDA) for key, tensor in on_cpu.items()}
    assert torch.equal(code.decode(moved).cpu(), code.decode(on_cpu))


@pytest.mark.parametrize("name", CODES)
def test_not_a_number_stays_so(name):
    matrices = torch.ones(2, 64, 3, device=CUDA)
    matrices[0, 5] = torch.zeros(3, device=CUDA) / 0
    decoded = CODES[name].decode(stored(CODES[name], matrices))
    assert decoded[0, 5].isnan().all()
    assert decoded[1].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_on_a_card_are_rounded_as_on_the_cpu(shape):
    """Integer arithmetic on the same bits."""
    matrices, names = stack("bf16", shape), [str(number) for number in range(shape[0])]
    found = []
    for device in (CPU, CUDA):
        keys = rounding_keys(names, 3, device)
        words = *row_words(keys, 64, shape[1]), column_words(keys, 7, shape[2])
        found.append(round_to_bf16(matrices.to(device), *words))
    assert found[1].is_cuda
    assert torch.equal(found[1].cpu(), found[0])
