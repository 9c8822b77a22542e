"""How a moment is stored in 8 or 16 bits per element, rounded stochastically so that the mean is exact.

The average of a second moment moves by a thousandth in a step, far less than 8 or 16 bits resolve, so rounding to the
nearest code would freeze it. With stochastic rounding, a number between two codes is rounded up with a probability
equal to its position between them. What decides is a dither: numbers that are spread evenly over the elements of a
tensor and shifted together by a random offset in every step. That takes two additions per element and gives the same
result on every layout and device, and after a resume. All of it is integer arithmetic on the bits of fp32: adding to
the bits that will be dropped carries into those that stay.
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
"""Bits of a dither: its values are below ``2**24``."""
DITHER_STRIDES = (12664746, 9560334)
"""Increments of the dither along rows and columns: ``2**24 / g`` and ``2**24 / g**2`` with g the root of x^3 = x + 1.
Their multiples fill a square evenly."""
MANTISSA_BITS = 23
"""Explicit bits of an fp32 mantissa."""
MAGNITUDE = 2**31 - 1
"""Mask of all bits of an fp32 number except its sign."""
CPU_CHUNK_ELEMENTS = 2**16
"""Elements that a CPU encodes or decodes at a time."""


class Quantizer(ABC):
    """A format in which an fp32 matrix is stored.

    Attributes:
        block_rows: how many consecutive rows, counted from row 0 of the whole tensor, must be stored on one rank.
    """

    block_rows: ClassVar[int] = 1

    @abstractmethod
    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of each tensor that is stored for one matrix.

        Args:
            rows: number of rows of the matrix.
            columns: number of columns of the matrix.

        Returns:
            For each tensor, under the suffix of its key in the state, the shape and the dtype.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Restore the matrix from what is stored.

        Args:
            stored: the tensors, under the suffixes of :meth:`tensors`.

        Returns:
            rows x columns, fp32.
        """

    @abstractmethod
    def encode(self, values: torch.Tensor, first: int, offset: int) -> dict[str, torch.Tensor]:
        """Convert a matrix to the tensors to store.

        Args:
            values: rows x columns, fp32.
            first: index of the first row in the whole tensor; a multiple of ``block_rows``.
            offset: the dither's random offset of this step, below 2^24, the same on all ranks.

        Returns:
            The tensors, under the suffixes of :meth:`tensors`.
        """

    def nbytes(self, rows: int, columns: int) -> int:
        """Number of bytes that are stored for one matrix.

        Args:
            rows: number of rows of the matrix.
            columns: number of columns of the matrix.
        """
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors(rows, columns).values())


class Exact(Quantizer):
    """Stores fp32 unchanged: :meth:`decode` returns the stored tensor itself."""

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """One fp32 tensor."""
        return {"": ((rows, columns), torch.float32)}

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the stored tensor."""
        return stored[""]

    def encode(self, values: torch.Tensor, first: int, offset: int) -> dict[str, torch.Tensor]:
        """Return the matrix itself, which is not copied."""
        return {"": values}


FP32 = Exact()
"""The quantizer that changes nothing."""


class BFloat16(Quantizer):
    """Stores bf16, the upper half of the bits of fp32, rounded stochastically."""

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """One bf16 tensor."""
        return {"": ((rows, columns), torch.bfloat16)}

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Convert to fp32, which is exact."""
        return stored[""].float()

    def encode(self, values: torch.Tensor, first: int, offset: int) -> dict[str, torch.Tensor]:
        """Round to bf16: add a 16-bit dither to the bits of fp32 and drop the lower half."""
        rows, columns = values.shape
        stored = torch.empty(rows, columns, dtype=torch.bfloat16, device=values.device)
        for start, end in chunks(rows, columns, values.device):
            noise = dither(first + start, end - start, columns, offset, values.device) >> (DITHER_BITS - 16)
            bits = values[start:end].view(torch.int32).add(noise).bitwise_and_(-(2**16))
            stored[start:end] = bits.view(torch.float32)
        return {"": stored}


class Int8(Quantizer):
    """Stores an 8-bit code per element, with a scale per block, rounded stochastically.

    A code is a sign and 4 bits of the exponent, or 5 bits of the exponent without a sign, and 3 bits of the mantissa.
    Code 0 is zero.

    A block is ``BLOCK`` rows of one column. Its largest magnitude is rounded up to 3 bits of mantissa, and its scale is
    the power of two of the result; exponents count down from there. Codes stand for the same numbers under every scale
    that reaches them. So a number that does not change keeps its value when its neighbors grow, and only what changed
    in a step is rounded.

    Args:
        signed: whether one bit is a sign; otherwise all values must be non-negative.

    Attributes:
        signed: as given.
        top: the largest code without its sign: 127 or 255.
        octaves: number of powers of two that the exponent covers: 16 with a sign, 32 without.
    """

    block_rows: ClassVar[int] = BLOCK
    KEPT: ClassVar[int] = 3
    """Bits of the mantissa that are stored: neighboring codes are between 6 % and 12.5 % apart."""
    DROPPED: ClassVar[int] = MANTISSA_BITS - KEPT
    """Bits of the mantissa that are rounded off."""

    def __init__(self, signed: bool) -> None:
        self.signed = signed
        self.top = 127 if signed else 255
        self.octaves = (self.top + 1) >> self.KEPT

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """The codes, and one scale per block and column."""
        scales = (-(-rows // BLOCK), columns)
        return {"": ((rows, columns), torch.uint8), "_scale": (scales, torch.float32)}

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Restore the numbers that the codes stand for, chunk by chunk."""
        codes, scales = stored[""], stored["_scale"]
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for start, end in chunks(codes.shape[0], codes.shape[1], codes.device):
            blocks = scales[start // BLOCK : -(-end // BLOCK)]
            values[start:end] = _unblocked(self._decoded(_blocked(codes[start:end]), blocks), end - start)
        return values

    def encode(self, values: torch.Tensor, first: int, offset: int) -> dict[str, torch.Tensor]:
        """Find the scale of each block and round its elements to codes, chunk by chunk."""
        rows, columns = values.shape
        stored = {
            suffix: torch.empty(shape, dtype=dtype, device=values.device)
            for suffix, (shape, dtype) in self.tensors(rows, columns).items()
        }
        for start, end in chunks(rows, columns, values.device):
            noise = dither(first + start, end - start, columns, offset, values.device)
            codes, scales = self._encoded(_blocked(values[start:end]), _blocked(noise))
            stored[""][start:end] = _unblocked(codes, end - start)
            stored["_scale"][start // BLOCK : -(-end // BLOCK)] = scales
        return stored

    def _encoded(self, values: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes and scales of some blocks.

        Args:
            values: blocks x BLOCK x columns, fp32.
            noise: the dither, same shape, int32.

        Returns:
            Codes, blocks x BLOCK x columns, uint8; scales, blocks x columns, fp32.
        """
        bits = values.view(torch.int32).bitwise_and(MAGNITUDE)
        largest = bits.amax(1)
        # The exponent of the largest magnitude rounded up, but high enough that the lowest code is not subnormal.
        scales = largest.add_(2**self.DROPPED - 1).bitwise_and_(-(2**MANTISSA_BITS))
        scales = scales.clamp_(min=self.octaves << MANTISSA_BITS)
        base = self._base(scales)
        codes = bits.add(noise >> (DITHER_BITS - self.DROPPED)).bitwise_right_shift_(self.DROPPED).sub_(base)
        lowest = ((base + 1) << self.DROPPED).view(torch.float32)
        # Between zero and the lowest code, round by the share of the lowest number. Without a sign always round up: a
        # second moment that became zero would be divided by.
        share = bits.view(torch.float32).div(lowest).mul_(1 << DITHER_BITS)
        is_low = share < (1 << DITHER_BITS)
        low = share.add_(noise) >= (1 << DITHER_BITS) if self.signed else bits > 0
        codes = torch.where(is_low, low.int(), codes).clamp_(max=self.top)
        if self.signed:
            codes |= (values.view(torch.int32) >> 24) & 128
        return codes.to(torch.uint8), scales.view(torch.float32)

    def _decoded(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The numbers of some blocks: blocks x BLOCK x columns, fp32."""
        signed_codes = codes.int()
        level = signed_codes & self.top
        base = self._base(scales.contiguous().view(torch.int32))
        values = ((level + base) << self.DROPPED).view(torch.float32).mul_(level > 0)
        return torch.where(signed_codes > self.top, -values, values) if self.signed else values

    def _base(self, scales: torch.Tensor) -> torch.Tensor:
        """The number to add to the codes of a block to get the upper bits of fp32: blocks x 1 x columns, int32.

        Args:
            scales: the bits of the scales, blocks x columns, int32.
        """
        return ((scales >> self.DROPPED) - ((self.octaves - 1) << self.KEPT)).unsqueeze(1)


def dither(first: int, rows: int, columns: int, offset: int, device: torch.device) -> torch.Tensor:
    """Integers below 2^24 that are spread evenly over rows and columns.

    Args:
        first: index of the first row in the whole tensor.
        rows: number of rows.
        columns: number of columns.
        offset: added to all of them, modulo 2^24; with a random offset each of them is uniformly distributed.
        device: where the result is needed.

    Returns:
        rows x columns, int32.
    """
    modulus = 1 << DITHER_BITS
    start = (first * DITHER_STRIDES[0] + offset) % modulus
    by_row = _multiples(DITHER_STRIDES[0], rows, device).add(start).unsqueeze(1)
    result: torch.Tensor = (by_row + _multiples(DITHER_STRIDES[1], columns, device)).bitwise_and_(modulus - 1)
    return result


def _multiples(factor: int, count: int, device: torch.device) -> torch.Tensor:
    """The first ``count`` multiples of a factor, from 0, modulo 2^24: int32."""
    return _table(factor, 1 << max(0, count - 1).bit_length(), device)[:count]


@lru_cache(maxsize=8)
def _table(factor: int, count: int, device: torch.device) -> torch.Tensor:
    """The multiples themselves, for powers of two as counts so that few tables are kept."""
    return (torch.arange(count, device=device) * factor % (1 << DITHER_BITS)).int()


def chunks(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut the rows of a tensor into ranges that are encoded or decoded at a time.

    Args:
        rows: number of rows.
        columns: number of columns.
        device: where the tensor is.

    Returns:
        ``(start, end)`` of each range; each starts at a multiple of ``BLOCK``.
    """
    elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else 2**24
    step = max(1, elements // (BLOCK * max(1, columns))) * BLOCK
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _blocked(tensor: torch.Tensor) -> torch.Tensor:
    """View rows x columns as blocks x BLOCK x columns, padded with zeros at the end."""
    rows, columns = tensor.shape
    padding = -rows % BLOCK
    if padding:
        tensor = torch.cat([tensor, tensor.new_zeros(padding, columns)])
    return tensor.reshape(-1, BLOCK, columns)


def _unblocked(blocks: torch.Tensor, rows: int) -> torch.Tensor:
    """View blocks x BLOCK x columns as rows x columns, without the padding."""
    return blocks.view(-1, blocks.shape[2])[:rows]
