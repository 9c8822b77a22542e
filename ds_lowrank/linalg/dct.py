"""Columns of the orthonormal DCT-II matrix: a fixed basis, in which gradients concentrate on few columns.

D_ji = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n))        column 0 times sqrt(1 / 2)
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch


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
    device = columns.device
    table = _cosines(size, device)
    odd = torch.arange(2 * rows[0] + 1, 2 * rows[1] + 1, 2, dtype=torch.int64, device=device).unsqueeze(1)
    found = torch.empty(len(columns), len(odd), columns.shape[1], dtype=torch.float32, device=device)
    for own, out in zip(columns, found, strict=True):  # one at a time: angles are int64
        torch.mul(table[odd * own % (4 * size)], torch.where(own == 0, math.sqrt(0.5), 1.0), out=out)
    return found


@lru_cache(maxsize=64)  # a basis is formed again in every step of its interval
def _cosines(size: int, device: torch.device) -> torch.Tensor:
    """``sqrt(2 / n) cos(pi k / (2 n))`` for one turn, k from 0 to 4 n - 1: fp32, rounded once."""
    turn = torch.arange(4 * size, dtype=torch.float64, device="cpu") * (math.pi / (2 * size))
    return (turn.cos() * math.sqrt(2 / size)).to(torch.float32).to(device)
