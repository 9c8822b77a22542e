"""How a moment is stored in fewer bits: codes of eight and sixteen bits, rounded so that the mean is exact.

The average of a second moment moves by a thousandth in a step, far less than eight or sixteen bits resolve, so rounding
to the nearest code would stop it for ever. Here a number between two codes goes to the upper one exactly as often as
its position between them says. What decides is evenly spread over the elements of a tensor, and moved as a whole by a
random amount in every step: two additions an element, the same on every layout, device and resume. All of it is integer
arithmetic on the bits of fp32: adding to the bits that are to go carries into those that stay.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import ClassVar

import torch

BLOCK = 64
"""Rows that share a scale, in each column."""
DITHER_BITS = 24
SPREAD = (12664746, 9560334)
"""Powers of the inverse of the root of x^3 = x + 1, times 2^24: their multiples fill a square evenly."""
MANTISSA_BITS = 23
MAGNITUDE = 2**31 - 1
CPU_CHUNK_ELEMENTS = 2**16
"""Numbers that a CPU codes at a time."""


def dither(first: int, rows: int, columns: int, offset: int, device: torch.device) -> torch.Tensor:
    """Whole numbers below 2^24, evenly spread over rows and columns.

    Args:
        first: which row of the whole tensor the first one is.
        offset: added to all; a random one makes each of them random.

    Returns:
        rows x columns, int32.
    """
    modulus = 1 << DITHER_BITS
    start = (first * SPREAD[0] + offset) % modulus
    by_row = _multiples(SPREAD[0], rows, device).add(start).unsqueeze(1)
    whole: torch.Tensor = (by_row + _multiples(SPREAD[1], columns, device)).bitwise_and_(modulus - 1)
    return whole


def _multiples(factor: int, count: int, device: torch.device) -> torch.Tensor:
    """The first of them, modulo 2^24, int32."""
    return _table(factor, 1 << max(0, count - 1).bit_length(), device)[:count]


@lru_cache(maxsize=8)
def _table(factor: int, count: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(count, device=device) * factor % (1 << DITHER_BITS)).int()


def chunks(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of rows, in multiples of BLOCK, that are coded at a time."""
    numbers = CPU_CHUNK_ELEMENTS if device.type == "cpu" else 2**24
    step = max(1, numbers // (BLOCK * max(1, columns))) * BLOCK
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


class Quantizer(ABC):
    """One way to store an fp32 tensor of p rows and q columns.

    Attributes:
        run: rows that must lie on one rank, counted from row 0 of the whole tensor.
    """

    block_rows: ClassVar[int] = 1

    @abstractmethod
    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of each tensor that is stored, under what is appended to the key."""

    @abstractmethod
    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """p x q, fp32."""

    @abstractmethod
    def encode(self, values: torch.Tensor, first: int, offset: int) -> dict[str, torch.Tensor]:
        """The tensors to store.

        Args:
            values: p x q, fp32.
            first: which row of the whole tensor the first one is; a multiple of ``run``.
            offset: a random number below 2^24, which all that is rounded in a step has in common.
        """

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of all that is stored."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors(rows, columns).values())


class Exact(Quantizer):
    """fp32 as it is; ``decode`` gives the stored tensor itself."""

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        return {"": ((rows, columns), torch.float32)}

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return stored[""]

    def encode(self, values: torch.Tensor, first: int, offset: int) -> dict[str, torch.Tensor]:
        return {"": values}


FP32 = Exact()


class BFloat16(Quantizer):
    """The upper half of fp32."""

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        return {"": ((rows, columns), torch.bfloat16)}

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return stored[""].float()

    def encode(self, values: torch.Tensor, first: int, offset: int) -> dict[str, torch.Tensor]:
        rows, columns = values.shape
        stored = torch.empty(rows, columns, dtype=torch.bfloat16, device=values.device)
        for start, end in chunks(rows, columns, values.device):
            by = dither(first + start, end - start, columns, offset, values.device) >> (DITHER_BITS - 16)
            bits = values[start:end].view(torch.int32).add(by).bitwise_and_(-(2**16))
            stored[start:end] = bits.view(torch.float32)
        return {"": stored}


class Int8(Quantizer):
    """Eight bits of each number: a sign if it has one, a few bits of its exponent, the first three of its mantissa.

    A block is BLOCK rows of one column. Its scale is the power of two below its largest number, or above where rounding
    up would reach that; exponents are counted down from there. Codes stand for the same numbers under every scale that
    reaches them, so a number that does not change keeps its value when its neighbours grow, and what is rounded in a
    step is what moved in it. Code 0 is zero.

    Attributes:
        signed: whether the first bit is a sign.
        octaves: powers of two that the exponent reaches over: 16 with a sign, 32 without.
    """

    block_rows: ClassVar[int] = BLOCK
    KEPT: ClassVar[int] = 3
    """Bits of the mantissa: numbers are between 6 % and 12.5 % apart."""
    DROPPED: ClassVar[int] = MANTISSA_BITS - KEPT

    def __init__(self, signed: bool) -> None:
        self.signed = signed
        self.top = 127 if signed else 255
        self.octaves = (self.top + 1) >> self.KEPT

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        scales = (-(-rows // BLOCK), columns)
        return {"": ((rows, columns), torch.uint8), "_scale": (scales, torch.float32)}

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes, scales = stored[""], stored["_scale"]
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for start, end in chunks(codes.shape[0], codes.shape[1], codes.device):
            blocks = scales[start // BLOCK : -(-end // BLOCK)]
            values[start:end] = _unblocked(self._decoded(_blocked(codes[start:end]), blocks), end - start)
        return values

    def encode(self, values: torch.Tensor, first: int, offset: int) -> dict[str, torch.Tensor]:
        rows, columns = values.shape
        stored = {
            suffix: torch.empty(shape, dtype=dtype, device=values.device)
            for suffix, (shape, dtype) in self.tensors(rows, columns).items()
        }
        for start, end in chunks(rows, columns, values.device):
            by = dither(first + start, end - start, columns, offset, values.device)
            codes, scales = self._encoded(_blocked(values[start:end]), _blocked(by))
            stored[""][start:end] = _unblocked(codes, end - start)
            stored["_scale"][start // BLOCK : -(-end // BLOCK)] = scales
        return stored

    def _encoded(self, values: torch.Tensor, by: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of blocks: blocks x BLOCK x columns, and blocks x columns."""
        bits = values.view(torch.int32).bitwise_and(MAGNITUDE)
        largest = bits.amax(1)
        # The exponent that rounding up would give, and high enough for the lowest code not to be a subnormal number.
        scales = largest.add_(2**self.DROPPED - 1).bitwise_and_(-(2**MANTISSA_BITS))
        scales = scales.clamp_(min=self.octaves << MANTISSA_BITS)
        base = self._base(scales)
        codes = bits.add(by >> (DITHER_BITS - self.DROPPED)).bitwise_right_shift_(self.DROPPED).sub_(base)
        lowest = ((base + 1) << self.DROPPED).view(torch.float32)
        # In the gap between zero and the lowest number. A second moment that became zero would be divided by.
        share = bits.view(torch.float32).div(lowest).mul_(1 << DITHER_BITS)
        is_low = share < (1 << DITHER_BITS)
        low = share.add_(by) >= (1 << DITHER_BITS) if self.signed else bits > 0
        codes = torch.where(is_low, low.int(), codes).clamp_(max=self.top)
        if self.signed:
            codes |= (values.view(torch.int32) >> 24) & 128
        return codes.to(torch.uint8), scales.view(torch.float32)

    def _decoded(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        whole = codes.int()
        level = whole & self.top
        base = self._base(scales.contiguous().view(torch.int32))
        values = ((level + base) << self.DROPPED).view(torch.float32).mul_(level > 0)
        return torch.where(whole > self.top, -values, values) if self.signed else values

    def _base(self, scales: torch.Tensor) -> torch.Tensor:
        """What to add to a code for the bits of its number: blocks x 1 x columns.

        Args:
            scales: their bits, blocks x columns, int32.
        """
        return ((scales >> self.DROPPED) - ((self.octaves - 1) << self.KEPT)).unsqueeze(1)


def _blocked(tensor: torch.Tensor) -> torch.Tensor:
    """Rows x columns as blocks x BLOCK x columns, zeros at the end."""
    rows, columns = tensor.shape
    missing = -rows % BLOCK
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, columns)])
    return tensor.reshape(-1, BLOCK, columns)


def _unblocked(blocks: torch.Tensor, rows: int) -> torch.Tensor:
    return blocks.view(-1, blocks.shape[2])[:rows]
