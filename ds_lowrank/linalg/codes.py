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
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

BLOCK = 64
"""Rows that share a scale, in each column."""
DITHER_BITS = 24
SPREAD = (12664746, 9560334)
"""Powers of the inverse of the root of x^3 = x + 1, times 2^24: their multiples fill a square evenly."""
MANTISSA_BITS = 23
MAGNITUDE = 2**31 - 1

Dither = Callable[[], torch.Tensor]
"""Makes what numbers are rounded by: for each a whole number below 2^24, int32."""


def spread(rows: torch.Tensor, columns: int, offset: int) -> torch.Tensor:
    """Whole numbers below 2^24, evenly spread over rows and columns.

    Args:
        rows: p, int64: which rows of the whole tensor these are.
        columns: q.
        offset: added to all; a random one makes each of them random.

    Returns:
        p x q, int32.
    """
    mask = 2**DITHER_BITS - 1
    by_row = (rows * SPREAD[0] + offset).bitwise_and_(mask).int().unsqueeze(1)
    by_column = (torch.arange(columns, device=rows.device) * SPREAD[1]).bitwise_and_(mask).int()
    whole: torch.Tensor = by_row + by_column
    return whole.bitwise_and_(mask)


class Code(ABC):
    """One way to store an fp32 tensor of p rows and q columns.

    Attributes:
        run: rows that must lie on one rank, counted from row 0 of the whole tensor.
    """

    run: ClassVar[int] = 1

    @abstractmethod
    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of each tensor that is stored, under what is appended to the key."""

    @abstractmethod
    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """p x q, fp32."""

    @abstractmethod
    def encode(self, values: torch.Tensor, dither: Dither) -> dict[str, torch.Tensor]:
        """The tensors to store for p x q fp32 numbers."""

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of all that is stored."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors(rows, columns).values())


class Exact(Code):
    """fp32 as it is; ``decode`` gives the stored tensor itself."""

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        return {"": ((rows, columns), torch.float32)}

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return stored[""]

    def encode(self, values: torch.Tensor, dither: Dither) -> dict[str, torch.Tensor]:
        return {"": values}


EXACT = Exact()


class BFloat16(Code):
    """The upper half of fp32."""

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        return {"": ((rows, columns), torch.bfloat16)}

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return stored[""].float()

    def encode(self, values: torch.Tensor, dither: Dither) -> dict[str, torch.Tensor]:
        bits = values.view(torch.int32) + (dither() >> (DITHER_BITS - 16))
        return {"": bits.bitwise_and_(-(2**16)).view(torch.float32).bfloat16()}


class Int8(Code):
    """Eight bits of each number: a sign if it has one, a few bits of its exponent, the first three of its mantissa.

    A block is BLOCK rows of one column. Its scale is the power of two below its largest number, or above where rounding
    up would reach that; exponents are counted down from there. Codes stand for the same numbers under every scale that
    reaches them, so a number that does not change keeps its value when its neighbours grow, and what is rounded in a
    step is what moved in it. Code 0 is zero.

    Attributes:
        signed: whether the first bit is a sign.
        octaves: powers of two that the exponent reaches over: 16 with a sign, 32 without.
    """

    run: ClassVar[int] = BLOCK
    KEPT: ClassVar[int] = 3
    """Bits of the mantissa: numbers are between 6 % and 12.5 % apart."""
    DROPPED: ClassVar[int] = MANTISSA_BITS - KEPT
    CHUNK: ClassVar[int] = 2**16
    """Numbers that a CPU codes at a time, so that what lies between stays in its cache."""

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
        for rows, blocks in self._chunks(codes):
            values[rows] = _unblocked(self._decoded(_blocked(codes[rows]), scales[blocks]), codes[rows])
        return values

    def encode(self, values: torch.Tensor, dither: Dither) -> dict[str, torch.Tensor]:
        by = dither()
        stored = {
            suffix: torch.empty(shape, dtype=dtype, device=values.device)
            for suffix, (shape, dtype) in self.tensors(*values.shape).items()
        }
        for rows, blocks in self._chunks(values):
            codes, stored["_scale"][blocks] = self._encoded(_blocked(values[rows]), _blocked(by[rows]))
            stored[""][rows] = _unblocked(codes, values[rows])
        return stored

    def _chunks(self, tensor: torch.Tensor) -> list[tuple[slice, slice]]:
        """Rows that are coded together, and the blocks that they are."""
        rows, columns = tensor.shape
        blocks = -(-rows // BLOCK)
        step = blocks if tensor.device.type != "cpu" else max(1, self.CHUNK // (BLOCK * max(1, columns)))
        return [
            (slice(at * BLOCK, min((at + step) * BLOCK, rows)), slice(at, min(at + step, blocks)))
            for at in range(0, blocks, max(1, step))
        ]

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
        share = bits.view(torch.float32).div(lowest).mul_(2**DITHER_BITS)
        is_low = share < 2**DITHER_BITS
        low = share.add_(by) >= 2**DITHER_BITS if self.signed else bits > 0
        codes = torch.where(is_low, low.int(), codes).clamp_(max=self.top)
        if self.signed:
            codes.add_((values < 0).int() << 7)
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


def _unblocked(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return blocks.view(-1, blocks.shape[2])[: like.shape[0]]
