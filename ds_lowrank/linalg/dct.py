"""Columns of the orthonormal DCT-II matrix: a fixed basis, in which gradients concentrate on few columns.

D_ji = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n))        column 0 times sqrt(1 / 2)
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

PART_ELEMENTS = 2**22
"""Elements at a time, whose angles are int64."""


def dct_columns(size: int, rows: tuple[int, int], columns: torch.Tensor) -> torch.Tensor:
    """Some rows of some columns of the DCT-II matrix of a size.

    Angles are reduced to one turn as integers, so that large matrices are as exact as small ones.

    Args:
        size: n, rows and columns of the whole matrix.
        rows: the first row and the one after the last.
        columns: which columns, a set for each matrix: L x k, int64.

    Returns:
        L x rows x k, fp32, on the device of ``columns``.
    """
    (start, end), count, device = rows, columns.shape[1], columns.device
    table = _cosines(size, device)
    scales = torch.ones(columns.shape, dtype=torch.float32, device=device).masked_fill_(columns == 0, math.sqrt(0.5))
    found = torch.empty(len(columns), end - start, count, dtype=torch.float32, device=device)
    height = max(1, PART_ELEMENTS // max(1, count))
    for own, scale, out in zip(columns, scales, found, strict=True):
        for row in range(start, end, height):
            last = min(row + height, end)
            odd = torch.arange(2 * row + 1, 2 * last + 1, 2, dtype=torch.int64, device=device).unsqueeze(1)
            torch.mul(table[odd * own % (4 * size)], scale, out=out[row - start : last - start])
    return found


@lru_cache(maxsize=64)  # a basis is formed again in every step of its interval
def _cosines(size: int, device: torch.device) -> torch.Tensor:
    """``sqrt(2 / n) cos(pi k / (2 n))`` for one turn, k from 0 to 4 n - 1: fp32, rounded once."""
    turn = torch.arange(4 * size, dtype=torch.float64, device="cpu") * (math.pi / (2 * size))
    return (turn.cos() * math.sqrt(2 / size)).to(torch.float32).to(device)
