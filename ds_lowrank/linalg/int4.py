"""How bases are stored in 4 bits per element: seven steps to either side of zero, two columns to a byte.

A basis is replaced as a whole and then stays, so it is rounded once, to nearest; nothing adds up that stochastic
rounding would have to keep. Blocks that share a scale are rows of one column, as in eight bits, so that every layout
has the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ds_lowrank.linalg.quantization import BLOCK, Quantizer, Range

STEPS = 7
"""Codes on either side of zero."""


class Int4(Quantizer):
    """Stores a code from -7 to 7 per element, two columns to a byte, with a scale per block.

    A block is ``BLOCK`` rows of one column. Its scale is a seventh of its largest magnitude, rounded up to bf16. So the
    largest element has the code 7, and what is decoded is encoded to the same codes again.
    """

    block_rows: ClassVar[int] = BLOCK

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Two columns' codes in each byte, and one scale per block and column."""
        codes, scales = (rows, -(-columns // 2)), (-(-rows // BLOCK), columns)
        return {"": (codes, torch.uint8), "_scale": (scales, torch.bfloat16)}

    def stored_rows(self, suffix: str, rows: Range) -> Range:
        """There is one scale for each block."""
        return (rows[0] // BLOCK, -(-rows[1] // BLOCK)) if suffix == "_scale" else rows

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The codes times their scales."""
        packed, scales = stored[""], stored["_scale"]
        count, rows, _ = packed.shape
        columns = scales.shape[2]
        codes = torch.stack([packed & 15, packed >> 4], dim=3).view(count, rows, 2 * packed.shape[2])[..., :columns]
        return (codes.float() - 8) * scales.float().repeat_interleave(BLOCK, dim=1)[:, :rows]

    def encode(self, values: torch.Tensor, first: int, offsets: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        """Find the scale of each block, and round its elements to the nearest code; ``offsets`` are not used."""
        count, rows, columns = values.shape
        scales = block_scales(values)
        by_row = scales.float().repeat_interleave(BLOCK, dim=1)[:, :rows]
        codes = torch.where(by_row == 0, 0.0, values / by_row).round_().clamp_(-STEPS, STEPS).add_(8).to(torch.uint8)
        pairs = torch.nn.functional.pad(codes, (0, columns % 2), value=8).view(count, rows, -(-columns // 2), 2)
        out[""].copy_(pairs[..., 0] | pairs[..., 1] << 4)
        out["_scale"].copy_(scales)


def block_scales(values: torch.Tensor) -> torch.Tensor:
    """A seventh of the largest magnitude of each block, rounded up to bf16; NaN if an element is not finite.

    Args:
        values: L x rows x columns, fp32.

    Returns:
        L x blocks x columns, bf16.
    """
    count, rows, columns = values.shape
    blocks = -(-rows // BLOCK)
    padded = torch.nn.functional.pad(values, (0, 0, 0, blocks * BLOCK - rows))
    largest = padded.view(count, blocks, BLOCK, columns).abs().amax(2) / STEPS
    bits = largest.contiguous().view(torch.int32)
    rounded = torch.where(largest.isfinite(), (bits + 0xFFFF).bitwise_right_shift(16), 0x7FC0)
    return rounded.to(torch.int16).view(torch.bfloat16)
