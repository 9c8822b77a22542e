"""Which cards have a peak, and under which names."""

import pytest
import torch

from ds_lowrank.environment.peaks import PEAKS, kind_of_products, peak_of


@pytest.mark.parametrize(
    ("name", "bf16", "memory"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 1555),
        ("NVIDIA A100-PCIE-40GB", 312, 1555),
        ("NVIDIA A100-SXM4-80GB", 312, 2039),
        ("NVIDIA A100 80GB PCIe", 312, 1935),
        ("NVIDIA H100 80GB HBM3", 989, 3350),
        ("NVIDIA H100 PCIe", 756, 2000),
        ("NVIDIA H100 NVL", 835, 3900),
        ("NVIDIA H200", 989, 4800),
        ("NVIDIA B200", 2250, 8000),
        ("NVIDIA L4", 121, 300),
        ("NVIDIA L40S", 362, 864),
        ("NVIDIA GeForce RTX 3090", 71, 936),
        ("NVIDIA GeForce RTX 4090", 165.2, 1008),
        ("NVIDIA GeForce RTX 5090", 209.5, 1792),
        ("AMD Instinct MI300X", 1307, 5300),
    ],
)
def test_known_cards(name, bf16, memory):
    peak = peak_of(name)
    assert (peak.bf16, peak.memory) == (bf16, memory)
    assert peak.tflops("bf16") == peak.tflops("fp16") > peak.tflops("tf32") >= peak.tflops("fp32")


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a seventh of one
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA L40",
        "NVIDIA GB200",
        "Tesla T4",
        "",
    ],
)
def test_a_card_of_another_name_is_not_taken_for_one(name):
    assert peak_of(name) is None


def test_a_card_without_structured_sparsity_does_about_half_in_tf32():
    for peak in PEAKS.values():
        assert peak.tf32 == pytest.approx(peak.bf16 / 2, rel=0.03)


def test_fp32_is_multiplied_in_tf32_where_torch_may():
    assert (kind_of_products("bf16"), kind_of_products("fp32")) == ("bf16", "fp32")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert (kind_of_products("fp16"), kind_of_products("fp32")) == ("fp16", "tf32")
    finally:
        torch.set_float32_matmul_precision(before)
