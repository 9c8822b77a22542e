"""What decides how a number is rounded stochastically: integers that are spread evenly over the elements of a matrix.

The dither of an element is ``(row * s1 + column * s2 + offset) mod 2^24``, whose strides fill a square evenly. Only the
offset is random: one number per matrix and step, a hash of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ds_lowrank.linalg.compiled import compiled_on_cuda

DITHER_BITS = 24
"""Bits of a dither: its values are below ``2**24``."""
DITHER_STRIDES = (12664746, 9560334)
"""Increments of the dither along rows and columns: ``2**24 / g`` and ``2**24 / g**2`` with g the root of x^3 = x + 1.
Their multiples fill a square evenly."""
MODULUS = 1 << DITHER_BITS


def offsets(hashes: Sequence[int] | torch.Tensor, step: int, device: torch.device) -> torch.Tensor:
    """The random offset of each matrix's dither in a step, by the generator splitmix64.

    Args:
        hashes: one number below 2^63 per matrix, which identifies it: L, int64. As a tensor that is on ``device``
            already it costs no transfer.
        step: the number of steps before this one.
        device: where the result is needed.

    Returns:
        L numbers below 2^24, int32, that pass for uniform over the steps and independent between matrices.
    """
    state = torch.as_tensor(hashes, dtype=torch.int64, device=device)
    return _upper_bits(state + as_int64(step * 0x9E3779B97F4A7C15))


def as_int64(number: int) -> int:
    """The number modulo 2^64, between -2^63 and 2^63.

    Args:
        number: any.
    """
    return (number + 2**63) % 2**64 - 2**63


FACTORS = as_int64(0xBF58476D1CE4E5B9), as_int64(0x94D049BB133111EB)
"""Of splitmix64's two multiplications."""


@compiled_on_cuda
def splitmix64(state: torch.Tensor) -> torch.Tensor:
    """What the generator splitmix64 makes of its state: 64 bits that pass for random.

    Args:
        state: any shape, int64.

    Returns:
        The same shape, int64.
    """
    return _mixed(state)


def _mixed(state: torch.Tensor) -> torch.Tensor:
    state = (state ^ _shifted(state, 30)) * FACTORS[0]
    state = (state ^ _shifted(state, 27)) * FACTORS[1]
    return state ^ _shifted(state, 31)


@compiled_on_cuda
def _upper_bits(state: torch.Tensor) -> torch.Tensor:
    """The upper 24 bits of what splitmix64 makes of its state: L, int64 to int32."""
    return _shifted(_mixed(state), 64 - DITHER_BITS).to(torch.int32)


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 to the right and fill with zeros; ``>>`` would fill with the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def dither_terms(
    first: int, rows: int, columns: int, matrix_offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of a dither, one per row and one per column, which :func:`dither` adds.

    Args:
        first: index of the first row in the whole tensor.
        rows: number of rows.
        columns: number of columns.
        matrix_offsets: L, int32, from :func:`offsets`; with a random offset each dither is uniformly distributed.

    Returns:
        L x rows x 1 and columns, int32, on the device of ``matrix_offsets``.
    """
    start = matrix_offsets + first * DITHER_STRIDES[0] % MODULUS
    by_row = start.unsqueeze(1) + _multiples(DITHER_STRIDES[0], rows, matrix_offsets.device)
    return by_row.unsqueeze(2), _multiples(DITHER_STRIDES[1], columns, matrix_offsets.device)


def dither(by_row: torch.Tensor, by_column: torch.Tensor) -> torch.Tensor:
    """Integers below 2^24 that are spread evenly over rows and columns.

    Args:
        by_row: ... x rows x 1, int32, from :func:`dither_terms`.
        by_column: columns, int32.

    Returns:
        ... x rows x columns, int32.
    """
    return (by_row + by_column).bitwise_and_(MODULUS - 1)


def _multiples(factor: int, count: int, device: torch.device) -> torch.Tensor:
    """The first ``count`` multiples of a factor, from 0, modulo 2^24: int32."""
    return _table(factor, 1 << max(0, count - 1).bit_length(), device)[:count]


@lru_cache(maxsize=8)
def _table(factor: int, count: int, device: torch.device) -> torch.Tensor:
    """The multiples themselves, for powers of two as counts so that few tables are kept."""
    return (torch.arange(count, device=device) * factor % MODULUS).int()
