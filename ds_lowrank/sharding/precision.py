"""In which precision a card multiplies matrices with gradients and weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

MatmulPrecision = Literal["fp32", "tf32"]
NAMES: dict[MatmulPrecision, str] = {"fp32": "highest", "tf32": "high"}
"""What :func:`torch.set_float32_matmul_precision` calls them."""
BF16_PIECES = 3
"""Numbers of 8 bits that an fp32 number of 24 bits is the sum of."""


@contextmanager
def products_in(precision: MatmulPrecision | None, device: torch.device) -> Iterator[None]:
    """Multiply fp32 matrices in that precision on a card, and restore torch's setting afterwards.

    Args:
        precision: ``fp32``, ``tf32`` or, for what torch is set to, None. A CPU always multiplies in fp32.
        device: where the matrices are.
    """
    before = torch.get_float32_matmul_precision() if precision is not None and device.type == "cuda" else None
    if precision is None or before is None or before == NAMES[precision]:
        yield
        return
    torch.set_float32_matmul_precision(NAMES[precision])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiplies_bf16(matrices: torch.Tensor) -> bool:
    """Whether a device multiplies matrices in bf16 and adds the products in fp32: a card does.

    Args:
        matrices: any.
    """
    return matrices.dtype == torch.bfloat16 and matrices.is_cuda


def bf16_product(matrices: Sequence[torch.Tensor], factors: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """``X F`` for each matrix of a stack, in bf16 but with the accuracy of fp32: no matrix is copied into fp32.

    Args:
        matrices: ``X`` in runs, each l x p x q, bf16.
        factors: ``F``, matrices x q x k, fp32.
        sizes: how many matrices each run has.

    Returns:
        matrices x p x k, fp32.
    """
    runs = zip(matrices, torch.split_with_sizes(bf16_pieces(factors), list(sizes)), strict=True)
    wide = torch.cat([_added_in_fp32(*pair) for pair in runs])
    first, second, third = torch.split(wide, factors.shape[2], dim=2)
    return second.add(third).add_(first)


def _added_in_fp32(matrices: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The products of two stacks in bf16, which are exact, added in fp32."""
    return torch.bmm(matrices, factors, out_dtype=torch.float32)


def bf16_pieces(factors: torch.Tensor) -> torch.Tensor:
    """Numbers as sums of numbers in bf16, so that a product with a matrix in bf16 needs no copy of it in fp32.

    Args:
        factors: l x q x k, fp32.

    Returns:
        l x q x 3k, bf16: the leading bits of all columns, then the middle ones, then the last ones.
    """
    pieces, rest = [], factors
    for _ in range(BF16_PIECES):
        pieces.append(rest.bfloat16())
        rest = rest - pieces[-1].float()
    return torch.cat(pieces, dim=2)
