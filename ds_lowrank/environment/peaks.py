"""What cards can do by their makers' data sheets: dense matrix products and memory.

Products are those of the tensor cores that accumulate in fp32, as torch's matmul does, without structured sparsity and
at the full power limit. A card under another name, a slice of one (MIG) or a mobile one of the same number is unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

MAKERS = re.compile(r"^(NVIDIA|AMD Instinct)\s+(GeForce\s+)?")


@dataclass(frozen=True)
class Peak:
    """What a card can do.

    Attributes:
        bf16: products of bf16 or fp16 matrices, in TFLOPS.
        tf32: products of fp32 matrices in TF32, in TFLOPS.
        fp32: products of fp32 matrices, in TFLOPS.
        memory: bandwidth of its memory, in GB/s (1e9 bytes).
    """

    bf16: float
    tf32: float
    fp32: float
    memory: float

    def tflops(self, kind: str) -> float:
        """The peak of a kind of product: ``fp32``, ``tf32``, ``bf16`` or ``fp16``, in TFLOPS."""
        return {"fp32": self.fp32, "tf32": self.tf32}.get(kind, self.bf16)


PEAKS = {
    r"A100-(SXM4|PCIE)-40GB": Peak(312.0, 156.0, 19.5, 1555.0),
    r"A100-SXM4-80GB": Peak(312.0, 156.0, 19.5, 2039.0),
    r"A100 80GB PCIe": Peak(312.0, 156.0, 19.5, 1935.0),
    r"H100 80GB HBM3": Peak(989.0, 494.0, 67.0, 3350.0),  # SXM
    r"H100 PCIe": Peak(756.0, 378.0, 51.0, 2000.0),
    r"H100 NVL": Peak(835.0, 417.0, 60.0, 3900.0),
    r"H200": Peak(989.0, 494.0, 67.0, 4800.0),
    r"B200": Peak(2250.0, 1100.0, 75.0, 8000.0),
    r"L4": Peak(121.0, 60.0, 30.3, 300.0),
    r"L40S": Peak(362.0, 183.0, 91.6, 864.0),
    r"RTX 3090": Peak(71.0, 35.6, 35.6, 936.0),
    r"RTX 4090": Peak(165.2, 82.6, 82.6, 1008.0),
    r"RTX 5090": Peak(209.5, 104.8, 104.8, 1792.0),
    r"MI300X": Peak(1307.0, 653.0, 163.0, 5300.0),
}
"""Peaks by the name that torch gives a card, without its maker: a pattern for the whole of it."""


def peak_of(name: str) -> Peak | None:
    """The peak of a card; None if it is not known.

    Args:
        name: the card's name, as ``torch.cuda.get_device_name`` gives it.
    """
    short = MAKERS.sub("", name.strip())
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, short)), None)


def kind_of_products(precision: str) -> str:
    """How matrices of a training precision are multiplied: ``bf16``, ``fp16``, ``fp32``, or ``tf32`` for fp32 matrices.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    uses_tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if uses_tf32 else precision
