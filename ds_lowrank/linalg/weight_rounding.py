"""How new bf16 weights are rounded where no fp32 copy remembers what rounding takes away: stochastically.

A step often moves a weight by a hundredth of the distance to the next bf16 number. Rounding to the nearest would undo
that every time. Here a number between two neighbors goes to either with a probability equal to its position between
them, so that the mean is exact: 16 random bits are added to the 16 bits of fp32 that are dropped.

The bits of element (i, j) are the upper half of the 32-bit word ``a_i c_j + b_i``, with random words ``a_i`` (odd) and
``b_i`` for the row and ``c_j`` for the column. They are uniform, and those of any two elements are independent, for one
multiplication and one addition each. The words are a function of name, step and index, so every replica and every
layout rounds alike. (The dither of :mod:`ds_lowrank.linalg.dither` is cheaper by the multiplication, but its pattern is
the same in each step. Where all weights of a matrix have one sign, the errors of many steps would add up along a few
directions.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ds_lowrank.linalg.compiled import compiled_on_cuda
from ds_lowrank.linalg.dither import as_int64, splitmix64
from ds_lowrank.linalg.sketch import name_hash

MAGNITUDE = 2**31 - 1
"""Mask of all bits of an fp32 number except its sign."""
LARGEST_NAN = 0x7FFF0000
"""Larger than the bits of infinity; 16 bits can be added without a carry into the sign."""
GOLDEN = 0x9E3779B97F4A7C15
"""The increment of splitmix64: 2^64 divided by the golden ratio."""


def rounding_keys(names: Sequence[str], step: int, device: torch.device) -> torch.Tensor:
    """What the random words of each matrix's rows and columns derive from in a step.

    Args:
        names: of the matrices.
        step: the number of steps before this one.
        device: where the result is needed.

    Returns:
        len(names) numbers, int64.
    """
    return splitmix64(_hashes(tuple(names), device) + as_int64(step * GOLDEN))


@lru_cache(maxsize=256)
def _hashes(names: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """One number for each matrix, which tells it apart from others and from the tensors of its state: int64."""
    return torch.tensor([name_hash(name, "weights") for name in names], dtype=torch.int64, device=device)


def row_words(keys: torch.Tensor, first: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The words ``a``, which are odd, and ``b`` of some rows.

    Args:
        keys: L, int64, from :func:`rounding_keys`.
        first: index of the first row in the whole matrix.
        rows: number of rows.

    Returns:
        Two tensors L x rows x 1, int32, on the device of ``keys``.
    """
    words = _words(keys, 2 * first + 1, rows)
    return words[..., :1] | 1, words[..., 1:]


def column_words(keys: torch.Tensor, first: int, columns: int) -> torch.Tensor:
    """The words ``c`` of some columns.

    Args:
        keys: L, int64, from :func:`rounding_keys`.
        first: index of the first column in the whole matrix.
        columns: number of columns.

    Returns:
        L x 1 x columns, int32, on the device of ``keys``.
    """
    return _words(keys, 2 * first + 2, columns)[..., 1].unsqueeze(1)


def _words(keys: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Every second number of the generator splitmix64 from one on, as two words: L x count x 2, int32."""
    places = torch.arange(first, first + 2 * count, 2, dtype=torch.int64, device=keys.device)
    return splitmix64(keys.unsqueeze(1) + places * as_int64(GOLDEN)).unsqueeze(2).view(torch.int32)


@compiled_on_cuda
def round_to_bf16(values: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Round to one of the two neighbors in bf16, to each with the probability that makes the mean exact.

    What bf16 holds is not changed, infinities and NaN included. Beyond the largest number of bf16 the next neighbor is
    infinity, as for every other way of rounding.

    Args:
        values: L x rows x columns, fp32.
        a: L x rows x 1, int32, odd.
        b: L x rows x 1, int32.
        c: L x 1 x columns, int32.

    Returns:
        L x rows x columns, bf16.
    """
    bits = values.view(torch.int32)
    noise = (a * c).add_(b).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    upper = (bits & MAGNITUDE).clamp_(max=LARGEST_NAN).add_(noise).bitwise_right_shift_(16)
    return upper.bitwise_or_(bits.bitwise_right_shift(31).bitwise_left_shift_(15)).to(torch.int16).view(torch.bfloat16)
