"""How moments are stored in 8 or 16 bits per element, rounded stochastically so that the mean is exact.

The average of a second moment moves by a thousandth in a step, far less than 8 or 16 bits resolve, so rounding to the
nearest code would freeze it. With stochastic rounding, a number between two codes is rounded up with a probability
equal to its position between them. What decides is a dither: numbers that are spread evenly over the elements of a
tensor and shifted together by a random offset in every step. That takes two additions per element and gives the same
result on every layout and device, and after a resume. All of it is integer arithmetic on the bits of fp32: adding to
the bits that will be dropped carries into those that stay.

Matrices of one shape are converted together, as a stack, with as many operations as for one of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from ds_lowrank.linalg.compiled import compiled_on_cuda
from ds_lowrank.linalg.dither import DITHER_BITS, dither, dither_terms
from ds_lowrank.linalg.int8_codes import decode_signed, decode_unsigned, encode_signed, encode_unsigned

BLOCK = 64
"""Rows that share a scale, in each column."""
CPU_CHUNK_ELEMENTS = 2**17
"""Elements that a CPU encodes or decodes at a time."""
CHUNK_ELEMENTS = 2**24
"""Elements that other devices encode or decode at a time, which bounds the temporary memory."""
Range = tuple[int, int]
"""A half-open range of rows."""


class Quantizer(ABC):
    """A format in which fp32 matrices are stored.

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
        """Restore a stack of matrices from what is stored.

        Args:
            stored: the tensors, under the suffixes of :meth:`tensors`, with a leading dimension L for the matrices.

        Returns:
            L x rows x columns, fp32.
        """

    @abstractmethod
    def encode(self, values: torch.Tensor, first: int, offsets: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        """Convert a stack of matrices to the tensors to store.

        Args:
            values: L x rows x columns, fp32.
            first: index of the first row in the whole tensor; a multiple of ``block_rows``.
            offsets: the random offset of each matrix's dither in this step, below 2^24, the same on all ranks: L,
                int32, on the device of ``values``; from :func:`ds_lowrank.linalg.dither.offsets`.
            out: the tensors to write to, under the suffixes of :meth:`tensors`, with a leading dimension L; they may
                be strided as long as rows are contiguous.
        """

    def __eq__(self, other: object) -> bool:
        """Whether both store the same bits."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        """A function of what is compared."""
        return hash((type(self), *vars(self).items()))

    def stored_rows(self, suffix: str, rows: Range) -> Range:
        """Where a stored tensor has what belongs to some rows of the matrix.

        Args:
            suffix: of the tensor, as in :meth:`tensors`.
            rows: ``[first, last)``; the first a multiple of ``block_rows``, the last too or the end of the matrix.
        """
        return rows

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

    def encode(self, values: torch.Tensor, first: int, offsets: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        """Copy the matrices, unless they are what was decoded."""
        if out[""] is not values:
            out[""].copy_(values)


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

    def encode(self, values: torch.Tensor, first: int, offsets: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        """Round to bf16: add a 16-bit dither to the bits of fp32 and drop the lower half."""
        for matrices, rows in chunks(values.shape, self.block_rows, values.device):
            chunk = values[matrices, rows]
            _, height, columns = chunk.shape
            by_row, by_column = dither_terms(first + rows.start, height, columns, offsets[matrices])
            rounded = _rounded_to_bf16(chunk.reshape(-1, columns), by_row.reshape(-1, 1), by_column)
            out[""][matrices, rows] = rounded.view(chunk.shape)


@compiled_on_cuda
def _rounded_to_bf16(values: torch.Tensor, by_row: torch.Tensor, by_column: torch.Tensor) -> torch.Tensor:
    """Round rows x columns, fp32, to bf16; the dither's terms are rows x 1 and columns, int32."""
    noise = dither(by_row, by_column).bitwise_right_shift_(DITHER_BITS - 16)
    bits = values.view(torch.int32).clamp(max=0x7FFF0000)  # NaN on CUDA has all bits set: adding would overflow
    return bits.add_(noise).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


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
    """

    block_rows: ClassVar[int] = BLOCK

    def __init__(self, signed: bool) -> None:
        self.signed = signed

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """The codes, and one scale per block and column."""
        scales = (-(-rows // BLOCK), columns)
        return {"": ((rows, columns), torch.uint8), "_scale": (scales, torch.float32)}

    def stored_rows(self, suffix: str, rows: Range) -> Range:
        """There is one scale for each block."""
        return (rows[0] // BLOCK, -(-rows[1] // BLOCK)) if suffix == "_scale" else rows

    def decode(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Restore the numbers that the codes stand for, chunk by chunk."""
        codes = stored[""]
        parts = list(chunks(codes.shape, BLOCK, codes.device))
        if len(parts) == 1:  # not copied
            return self._decode_part(stored, *parts[0])
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for matrices, rows in parts:
            values[matrices, rows] = self._decode_part(stored, matrices, rows)
        return values

    def _decode_part(self, stored: Mapping[str, torch.Tensor], matrices: slice, rows: slice) -> torch.Tensor:
        """Decode some rows of some matrices."""
        codes, scales = stored[""][matrices, rows], stored["_scale"][matrices, _blocks_of(rows)]
        decode = decode_signed if self.signed else decode_unsigned
        return decode(_blocks(codes), scales.reshape(-1, 1, scales.shape[2])).view(codes.shape)

    def encode(self, values: torch.Tensor, first: int, offsets: torch.Tensor, out: Mapping[str, torch.Tensor]) -> None:
        """Find the scale of each block and round its elements to codes, chunk by chunk."""
        encode = encode_signed if self.signed else encode_unsigned
        for matrices, rows in chunks(values.shape, BLOCK, values.device):
            chunk = values[matrices, rows]
            _, height, columns = chunk.shape
            by_row, by_column = dither_terms(first + rows.start, height, columns, offsets[matrices])
            codes, scales = encode(_blocks(chunk), _blocks(by_row), by_column)
            out[""][matrices, rows] = codes.view(chunk.shape)
            own = out["_scale"][matrices, _blocks_of(rows)]
            own.copy_(scales.view(own.shape))


def chunks(shape: torch.Size, block_rows: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut a stack of matrices into parts that are encoded or decoded at a time.

    Args:
        shape: L x rows x columns.
        block_rows: the number of rows of a block.
        device: where the stack is.

    Returns:
        The matrices and the rows of each part. It has whole blocks, or only the last block of each matrix if that has
        fewer rows.
    """
    if not shape.numel():
        return
    count, rows, columns = shape
    elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS
    row_step = max(1, elements // (block_rows * columns)) * block_rows
    full = rows - rows % block_rows
    for start, end in ((0, full), (full, rows)):
        step = max(1, elements // max(1, (end - start) * columns))
        for matrix in range(0, count, step):
            for row in range(start, end, row_step):
                yield slice(matrix, min(matrix + step, count)), slice(row, min(row + row_step, end))


def _blocks(chunk: torch.Tensor) -> torch.Tensor:
    """View matrices x rows x columns as blocks x height x columns: whole blocks, or one of fewer rows per matrix."""
    count, rows, columns = chunk.shape
    height = min(BLOCK, rows)
    return chunk.reshape(count * (rows // height), height, columns)


def _blocks_of(rows: slice) -> slice:
    """The blocks that some rows consist of."""
    return slice(rows.start // BLOCK, -(-rows.stop // BLOCK))
