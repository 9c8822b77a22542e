"""This rank's elements of the matrices of a stack, wherever they lie in memory, as few batches of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from ds_lowrank.sharding.layout import Rectangle
from ds_lowrank.sharding.precision import bf16_product, multiplies_bf16

DENSE_ELEMENTS = 2**22
"""What is dense and in fp32 is computed for this many elements at a time, or for one matrix."""


class Piece(NamedTuple):
    """A rectangle of consecutive matrices of a stack.

    Attributes:
        matrices: the positions of these matrices in the stack.
        rectangle: the rows and columns.
        values: a view of the elements: matrices x rows x columns.
    """

    matrices: slice
    rectangle: Rectangle
    values: torch.Tensor


class Rounding(Protocol):
    """How new weights in bf16 are rounded."""

    def write(self, piece: Piece, values: torch.Tensor) -> None:
        """Round new weights and write them.

        Args:
            piece: of the weights, bf16.
            values: the new weights there: matrices x rows x columns, fp32.
        """


class Elements:
    """The elements on this rank of a tensor of every matrix in a stack: gradients or weights.

    Args:
        runs: consecutive matrices whose elements are evenly spaced in memory: each run's elements in storage order,
            contiguous for every matrix, in any shape that begins with the matrices or is that of one matrix; any
            floating dtype.
        sizes: how many matrices each run has.
        rectangles: of the elements of one matrix.

    Attributes:
        runs: as given.
        sizes: as given.
    """

    def __init__(self, runs: Sequence[torch.Tensor], sizes: Sequence[int], rectangles: Sequence[Rectangle]) -> None:
        self.runs, self.sizes, self._rectangles = runs, sizes, rectangles

    @cached_property
    def singles(self) -> list[torch.Tensor] | None:
        """The matrices themselves, rows x columns in fp32, if each is one rectangle with a place of its own."""
        if len(self._rectangles) != 1 or len(self.runs) != sum(self.sizes):
            return None
        (r,) = self._rectangles
        shape = r.height, r.width
        found = [run if run.shape == shape else run.view(shape) for run in self.runs]
        return found if all(matrix.dtype == torch.float32 for matrix in found) else None

    @cached_property
    def pieces(self) -> list[Piece]:
        """All elements: a piece for every rectangle of every run."""
        return list(self._pieces(self.runs, self.sizes))

    @property
    def changed_pieces(self) -> Iterator[Piece]:
        """All elements in pieces to be changed in fp32: bounded ones if that takes a copy."""
        return iter(self.pieces) if all(run.dtype == torch.float32 for run in self.runs) else self.dense_pieces

    @property
    def dense_pieces(self) -> Iterator[Piece]:
        """All elements in pieces of a bounded number of elements, or of a matrix with more than one row."""
        for piece in self._bounded_runs():
            matrices, r, values = piece
            if r.height > 1 or r.width <= DENSE_ELEMENTS:
                yield piece
                continue
            for start in range(0, r.width, DENSE_ELEMENTS):
                width = min(DENSE_ELEMENTS, r.width - start)
                part = Rectangle(r.row, r.col + start, 1, width, r.offset + start)
                yield Piece(matrices, part, values[:, :, start : start + width])

    def _bounded_runs(self) -> Iterator[Piece]:
        """All elements in pieces of one matrix, or of a bounded number of elements."""
        most = max(1, DENSE_ELEMENTS // max(1, self._numel))
        runs, sizes = [], []
        for run, size in zip(self.runs, self.sizes, strict=True):
            if size <= most:
                runs.append(run)
                sizes.append(size)
                continue
            for part in torch.split(run.view(size, self._numel), most):
                runs.append(part)
                sizes.append(part.shape[0])
        return self._pieces(runs, sizes)

    @property
    def _numel(self) -> int:
        return sum(r.height * r.width for r in self._rectangles)

    def _pieces(self, runs: Sequence[torch.Tensor], sizes: Sequence[int]) -> Iterator[Piece]:
        start, numel = 0, self._numel
        for run, size in zip(runs, sizes, strict=True):
            matrices = slice(start, start + size)
            start += size
            for r in self._rectangles:
                count = r.height * r.width
                flat = run if count == numel else run.view(size, numel)[:, r.offset : r.offset + count]
                yield Piece(matrices, r, flat.view(size, r.height, r.width))

    def values_at(self, piece: Piece) -> torch.Tensor:
        """The elements where a piece of another tensor of the stack is: matrices x rows x columns.

        Args:
            piece: of elements in the same runs, or of a part of a run.

        Raises:
            IndexError: the piece is of matrices that are not all in one of these runs.
        """
        start, r, numel = 0, piece.rectangle, self._numel
        for run, size in zip(self.runs, self.sizes, strict=True):
            if start <= piece.matrices.start and piece.matrices.stop <= start + size:
                part = run.view(size, numel)[piece.matrices.start - start : piece.matrices.stop - start]
                return part[:, r.offset : r.offset + r.height * r.width].view(-1, r.height, r.width)
            start += size
        raise IndexError(f"no run of this stack of {start} matrices has all of {piece.matrices}")

    def times(
        self, factor: torch.Tensor, inner: tuple[int, int], outer: tuple[int, int], transposed: bool = False
    ) -> torch.Tensor:
        """This rank's contribution to ``X @ factor`` for each matrix, or to ``X^T @ factor``.

        Args:
            factor: matrices x rows of ``inner`` x k, fp32.
            inner: the range of columns (transposed: rows) that the factor has.
            outer: the range of rows (transposed: columns) that the result has.
            transposed: whether the transposes are multiplied.

        Returns:
            matrices x rows of ``outer`` x k, fp32.
        """
        shape = factor.shape[0], outer[1] - outer[0], factor.shape[2]
        if (singles := self.singles) is not None:
            result = factor.new_empty(shape)
            if transposed:  # the transposes of both sides: those of the stacks are views that cost nothing
                for matrix, rows, out in zip(singles, factor.mT.unbind(), result.mT.unbind(), strict=True):
                    torch.mm(rows, matrix, out=out)
            else:
                for matrix, rows, out in zip(singles, factor.unbind(), result.unbind(), strict=True):
                    torch.mm(matrix, rows, out=out)
            return result
        if len(self._rectangles) == 1 and all(multiplies_bf16(run) for run in self.runs):
            values = [piece.values.mT if transposed else piece.values for piece in self.pieces]
            return bf16_product(values, factor, self.sizes)
        if len(self._rectangles) == 1:
            result = factor.new_empty(shape)
            factors, outs = torch.split_with_sizes(factor, self.sizes), torch.split_with_sizes(result, self.sizes)
            for piece, rows, out in zip(self.pieces, factors, outs, strict=True):
                product(piece.values.mT if transposed else piece.values, rows, out)
            return result
        result = factor.new_zeros(shape)
        for piece in self.pieces:
            r = piece.rectangle
            spans = (r.col - inner[0], r.width), (r.row - outer[0], r.height)
            if transposed:
                spans = (r.row - inner[0], r.height), (r.col - outer[0], r.width)
            (first, count), (out_first, out_count) = spans
            rows = factor[piece.matrices, first : first + count]
            out = result[piece.matrices, out_first : out_first + out_count]
            add_product(piece.values.mT if transposed else piece.values, rows, out)
        return result


def product(matrices: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
    """``out <- X F`` for each matrix.

    Args:
        matrices: ``X``, l x p x q, any floating dtype.
        factors: ``F``, l x q x k, fp32.
        out: l x p x k, fp32.
    """
    torch.bmm(matrices.float(), factors, out=out)


def add_product(matrices: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
    """``out <- out + X F`` for each matrix.

    Args:
        matrices: ``X``, l x p x q, any floating dtype.
        factors: ``F``, l x q x k, fp32.
        out: l x p x k, fp32.
    """
    out.baddbmm_(matrices.float(), factors)
