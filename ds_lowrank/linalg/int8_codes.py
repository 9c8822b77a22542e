"""Arithmetic of the 8-bit codes: integer operations on the bits of fp32, on blocks of a stack of matrices.

Comparisons, selections and conversions from booleans cost five to twenty times as much as an addition on a CPU. So a
number is zeroed by multiplying with 0 or 1, or by masking it with the sign of a difference.

Blocks are n x height x columns, of any matrices of a stack, and their scales n x 1 x columns.
"""

from __future__ import annotations

import torch

from ds_lowrank.linalg.compiled import compiled_on_cuda
from ds_lowrank.linalg.dither import DITHER_BITS, dither

MANTISSA_BITS = 23
"""Explicit bits of an fp32 mantissa."""
MAGNITUDE = 2**31 - 1
"""Mask of all bits of an fp32 number except its sign."""
SIGN = -(2**31)
"""Mask of the sign."""
INFINITY = 255 << MANTISSA_BITS
"""The bits of infinity; those of NaN are larger."""
ONE_OF_DITHER = (127 + DITHER_BITS) << MANTISSA_BITS
"""The bits of 2^24 in fp32."""

KEPT = 3
"""Bits of the mantissa that are stored: neighboring codes are between 6 % and 12.5 % apart."""
DROPPED = MANTISSA_BITS - KEPT
"""Bits of the mantissa that are rounded off."""
TOP = {True: 127, False: 255}
"""The largest code without its sign, by whether there is one."""
OCTAVES = {signed: (top + 1) >> KEPT for signed, top in TOP.items()}
"""Number of powers of two that the exponent covers: 16 with a sign, 32 without."""


@compiled_on_cuda
def encode_signed(
    values: torch.Tensor, by_row: torch.Tensor, by_column: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round numbers to codes with a sign. Between zero and the lowest code the share of the lowest number decides.

    Args:
        values: blocks, fp32.
        by_row: the dither's term of each row, n x height x 1, int32.
        by_column: the dither's term of each column, int32.

    Returns:
        The codes, as blocks, uint8, and their scales, fp32.
    """
    bits, exponents = _bits_and_exponents(values, OCTAVES[True])
    base, noise = _base(exponents, OCTAVES[True]), dither(by_row, by_column)
    lowest = ((base + 1) << DROPPED).view(torch.float32)
    share = noise.float().add_(bits.view(torch.float32).div(lowest), alpha=1 << DITHER_BITS)
    reached = torch.rsub(share.view(torch.int32), ONE_OF_DITHER - 1).bitwise_right_shift_(31)  # -1 or 0
    codes = _rounded(bits, base, noise).clamp_(1, TOP[True]).bitwise_and_(reached)
    codes = codes.sub_(values.view(torch.int32) >> 31, alpha=TOP[True] + 1)
    return codes.to(torch.uint8), exponents.view(torch.float32)


@compiled_on_cuda
def encode_unsigned(
    values: torch.Tensor, by_row: torch.Tensor, by_column: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round non-negative numbers to codes. None but zero becomes zero: second moments are divided by.

    Args:
        values: blocks, fp32.
        by_row: the dither's term of each row, n x height x 1, int32.
        by_column: the dither's term of each column, int32.

    Returns:
        The codes, as blocks, uint8, and their scales, fp32.
    """
    bits, exponents = _bits_and_exponents(values, OCTAVES[False])
    nonzero = bits.clamp(max=1)
    codes = _rounded(bits, _base(exponents, OCTAVES[False]), dither(by_row, by_column))
    codes = torch.maximum(codes, nonzero).clamp_(max=TOP[False])
    return codes.to(torch.uint8), exponents.view(torch.float32)


@compiled_on_cuda
def decode_signed(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Restore the numbers that codes with a sign stand for.

    Args:
        codes: blocks, uint8.
        scales: of the blocks, fp32.

    Returns:
        Blocks, fp32.
    """
    signed = codes.view(torch.int8).int()
    level = signed & TOP[True]
    nonzero = level.clamp(max=1)
    bits = level.add_(_base(scales.view(torch.int32), OCTAVES[True])).bitwise_left_shift_(DROPPED).mul_(nonzero)
    return bits.bitwise_or_(signed.bitwise_and_(SIGN)).view(torch.float32)


@compiled_on_cuda
def decode_unsigned(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Restore the numbers that codes without a sign stand for.

    Args:
        codes: blocks, uint8.
        scales: of the blocks, fp32.

    Returns:
        Blocks, fp32.
    """
    level = codes.int()
    nonzero = level.clamp(max=1)
    bits = level.add_(_base(scales.view(torch.int32), OCTAVES[False])).bitwise_left_shift_(DROPPED)
    return bits.mul_(nonzero).view(torch.float32)


def _bits_and_exponents(values: torch.Tensor, octaves: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of the magnitudes and those of the scales, int32."""
    bits = values.view(torch.int32).bitwise_and(MAGNITUDE)
    # NaN on CUDA has all bits set, to which nothing can be added.
    largest = bits.amax(1, keepdim=True).clamp_(max=INFINITY)
    # The exponent of the largest magnitude rounded up, but high enough that the lowest code is not subnormal.
    rounded_up = largest.add_(2**DROPPED - 1).bitwise_and_(-(2**MANTISSA_BITS))
    return bits, rounded_up.clamp_(min=octaves << MANTISSA_BITS)


def _base(exponents: torch.Tensor, octaves: int) -> torch.Tensor:
    """The number to add to the codes of a block to get the upper bits of fp32: n x 1 x columns, int32."""
    return (exponents >> DROPPED).sub_((octaves - 1) << KEPT)


def _rounded(bits: torch.Tensor, base: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Codes before they are limited to what can be stored; uses up ``bits`` and ``noise``."""
    dropped = noise.bitwise_right_shift_(DITHER_BITS - DROPPED)
    return bits.sub_(base << DROPPED).add_(dropped).bitwise_right_shift_(DROPPED)
