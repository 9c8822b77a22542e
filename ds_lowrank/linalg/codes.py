"""How a moment is stored in fewer bits: codes of eight and sixteen bits, rounded so that the mean is exact.

The average of a second moment moves by a thousandth in a step, far less than eight or sixteen bits resolve, so rounding
to the nearest code would stop it for ever. Here a number between two codes goes to the upper one exactly as often as
its position between them says. *How often* is counted off by an additive sequence in (row, column, step) instead of a
random generator: it costs two additions, fills the interval more evenly than chance, and is the same on every layout,
device and resume.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

BLOCK = 64
"""Rows that share a scale, in each column."""
MODULUS = 2**24
SEQUENCE = (13743434, 11258244, 9222444)
"""Powers of the inverse of the root of x^4 = x + 1, times MODULUS: the additive sequence that fills a cube evenly."""

Dither = Callable[[], torch.Tensor]
"""Makes the fractions in [0, 1) that numbers are rounded by, one for each."""


def fractions(rows: torch.Tensor, columns: int, step: int, salt: int) -> torch.Tensor:
    """Numbers in [0, 1), evenly spread over rows, columns and steps.

    Args:
        rows: p, int64: which rows of the whole tensor these are.
        columns: q.
        step: of the optimizer.
        salt: sets tensors apart.

    Returns:
        p x q, fp32.
    """
    by_row = (rows * SEQUENCE[0] + (step * SEQUENCE[2] + salt) % MODULUS) % MODULUS
    by_column = torch.arange(columns, device=rows.device) * SEQUENCE[1] % MODULUS
    whole = by_row.int().unsqueeze(1) + by_column.int()
    return (whole & (MODULUS - 1)).float() / MODULUS


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
        lower = (dither() * 2**16).int()
        bits = (values.view(torch.int32) + lower) & -(2**16)
        return {"": bits.view(torch.float32).bfloat16()}


class Logarithmic(Code):
    """Eight bits: powers of ``base``, in a window below the largest number of a block.

    A block is BLOCK rows of one column. The powers are the same everywhere; a block's scale, one of them, only says
    where its window ends. So a number that does not change keeps its code when its neighbours grow, and what is rounded
    in a step is what moved in it. Code 0 is zero.

    Attributes:
        signed: whether the first bit is a sign.
        per_octave: codes from one power of two to the next.
    """

    run: ClassVar[int] = BLOCK
    SNAP: ClassVar[float] = 1e-3
    """A largest number so near above a power, in codes, has that power as its scale: log2 is not exact."""

    def __init__(self, signed: bool) -> None:
        self.signed = signed
        self.top = 127 if signed else 255
        self.per_octave = 8 if signed else 11  # 9.1 % apart down to 2^-15.75; 6.5 % down to 2^-23

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        scales = (-(-rows // BLOCK), columns)
        return {"": ((rows, columns), torch.uint8), "_scale": (scales, torch.float32)}

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes = stored[""]
        scales = by_row(stored["_scale"], codes.shape[0])
        level = (codes & self.top) if self.signed else codes
        # (code - top) / per_octave is at most the exponent of the power, relative to the scale.
        values = torch.exp2((level.float() - self.top) / self.per_octave).mul_(scales).mul_(level > 0)
        return torch.where(codes > self.top, -values, values) if self.signed else values

    def encode(self, values: torch.Tensor, dither: Dither) -> dict[str, torch.Tensor]:
        sizes = values.abs()
        scales = self._scales(sizes)
        relative = sizes / by_row(scales, sizes.shape[0])
        # The code as a real number; in the linear gap below the lowest power, zero and that power are neighbours.
        position = torch.log2(relative).mul_(self.per_octave).add_(self.top)
        lower = torch.floor(position).clamp_(0, self.top)
        power = torch.exp2((lower - self.top) / self.per_octave)
        share = (relative / power - 1) / (2 ** (1 / self.per_octave) - 1)
        lowest = 2 ** ((1 - self.top) / self.per_octave)
        share = torch.where(lower > 0, share, relative / lowest)
        if not self.signed:
            # A second moment that became zero would be divided by: it stays at the lowest power.
            share = torch.where((lower == 0) & (relative > 0), 1.0, share)
        codes = lower.add_(share > dither()).clamp_(max=self.top).to(torch.uint8)
        if self.signed:
            codes |= (values < 0).to(torch.uint8) << 7
        return {"": codes, "_scale": scales}

    def _scales(self, sizes: torch.Tensor) -> torch.Tensor:
        """For each block the least power that is not below its largest number; one for a block of zeros."""
        rows, columns = sizes.shape
        blocks = -(-rows // BLOCK)
        padded = torch.nn.functional.pad(sizes, (0, 0, 0, blocks * BLOCK - rows))
        largest = padded.view(blocks, BLOCK, columns).amax(1) if blocks else sizes
        exponent = torch.ceil(torch.log2(largest) * self.per_octave - self.SNAP) / self.per_octave
        return torch.where(largest > 0, torch.exp2(exponent.clamp(-126, 127)), 1.0)


def by_row(blocks: torch.Tensor, rows: int) -> torch.Tensor:
    """One row a block, repeated for every row that belongs to it."""
    return blocks.repeat_interleave(BLOCK, 0)[:rows]
