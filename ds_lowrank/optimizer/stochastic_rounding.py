"""Rounds the new weights of a stack stochastically, alike on every replica and however its matrices are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ds_lowrank.linalg.quantization import chunks
from ds_lowrank.linalg.weight_rounding import column_words, round_to_bf16, rounding_keys, row_words
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.layout import Rectangle

ROW = 4096
"""Elements of a matrix of one row, as which vectors and embeddings are stepped, that are rounded as one row."""


class StochasticRounding:
    """How the weights of a stack are rounded in one step: a function of the matrices' names, the step and the element.

    Args:
        names: of the matrices.
        step: the number of steps before this one.
        has_rows: whether the matrices have more than one row.
        device: of the weights.
    """

    def __init__(self, names: Sequence[str], step: int, has_rows: bool, device: torch.device) -> None:
        self._keys, self._has_rows = rounding_keys(names, step, device), has_rows

    def write(self, piece: Piece, values: torch.Tensor) -> None:
        """Round new weights and write them.

        Args:
            piece: of the weights, bf16.
            values: the new weights there: matrices x rows x columns, fp32.
        """
        keys = self._keys[piece.matrices]
        if self._has_rows:
            _write(piece.values, values, keys, piece.rectangle)
            return
        for r in _folded(piece.rectangle):
            span = slice(r.offset, r.offset + r.height * r.width)
            out, new = (t[:, 0, span].view(-1, r.height, r.width) for t in (piece.values, values))
            _write(out, new, keys, r)


def _folded(interval: Rectangle) -> Iterator[Rectangle]:
    """An interval of a matrix of one row as rectangles of that matrix in rows of ``ROW`` elements.

    Their offsets are counted from the beginning of the interval.
    """
    start, end = interval.col, interval.col + interval.width
    position = start
    while position < end:
        row, col = divmod(position, ROW)
        if col or end - position < ROW:
            height, width = 1, min(ROW - col, end - position)
        else:
            height, width = (end - position) // ROW, ROW
        yield Rectangle(row, col, height, width, position - start)
        position += height * width


def _write(out: torch.Tensor, values: torch.Tensor, keys: torch.Tensor, r: Rectangle) -> None:
    """Round what is written into a rectangle of some matrices, part by part."""
    c = column_words(keys, r.col, r.width)
    a, b = row_words(keys, r.row, r.height)
    for at in chunks(values.shape, 1, values.device):
        out[at] = round_to_bf16(values[at], a[at], b[at], c[at[0]])
