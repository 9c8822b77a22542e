"""Products in the precision that was asked for, and of gradients in bf16 without a copy of them."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.sharding import elements, precision
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.layout import whole
from ds_lowrank.sharding.matrix import shard_of
from ds_lowrank.sharding.precision import bf16_pieces, products_in

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(("asked", "set_to"), [("fp32", "highest"), ("tf32", "high")])
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_a_card_multiplies_as_asked_and_torchs_setting_comes_back(before, asked, set_to):
    own = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        with pytest.raises(KeyError), products_in(asked, CUDA):
            assert torch.get_float32_matmul_precision() == set_to
            raise KeyError
        for precision_asked, device in ((asked, CPU), (None, CUDA)):
            with products_in(precision_asked, device):
                assert torch.get_float32_matmul_precision() == before
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(own)


def test_three_numbers_in_bf16_are_one_in_fp32():
    """Each holds 8 bits of 24, and their sum the whole number."""
    numbers = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    pieces = bf16_pieces(numbers).float().split(3, dim=2)
    assert torch.equal(pieces[2] + pieces[1] + pieces[0], numbers)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gradient_in_bf16_is_multiplied_as_its_copy_in_fp32_is(monkeypatch, side, transposed):
    """What only a card does, a product of bf16 numbers that is added in fp32, is done in fp32 here: also exact."""
    monkeypatch.setattr(elements, "multiplies_bf16", lambda values: values.dtype == torch.bfloat16)
    monkeypatch.setattr(precision, "_added_in_fp32", lambda a, b: torch.bmm(a.float(), b.float()))
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry((12, 8), [whole((12, 8))], 0, side)
    gradient = torch.randn(96, generator=generator).bfloat16()
    in_bf16, in_fp32 = shard_of("w", geometry, gradient), shard_of("w", geometry, gradient.float())
    rows = (12 if transposed else 8) if side == "right" else (8 if transposed else 12)
    factor = torch.randn(1, rows, 4, generator=generator)
    found, expected = (shard.product(shard.gradient, factor, transposed) for shard in (in_bf16, in_fp32))
    assert (found - expected).norm() < 4 * torch.finfo(torch.float32).eps * expected.norm()
