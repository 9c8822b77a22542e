"""Random sketches that are the same on every rank, layout and device."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product

import torch

from ds_lowrank.linalg.compiled import compiled_on_cuda
from ds_lowrank.linalg.philox import WORD, Words, philox

LANES = 2**15
"""Calls of the generator at a time on a CPU, four elements each: the few int64 numbers for each stay in its cache."""
DEVICE_LANES = 2**22
"""The same on any other device: enough to keep it busy, in 64 MiB, or 0.5 GiB where the function is not compiled."""


def name_hash(*parts: str | int) -> int:
    """Hash names and counters to a 63-bit number that is the same in every process.

    Args:
        *parts: the names and counters, in order.
    """
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def normal(
    seed: int,
    names: Sequence[str],
    counter: int | str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    device: torch.device,
) -> torch.Tensor:
    """Draw a part of each of the standard normal matrices of some parameters.

    A matrix is a function of (seed, name, counter) and has no end in either direction: any part of it can be drawn
    without the rest, and has the same bits. The element at (row, column) is ``z_i``, i = column mod 4, of what Box and
    Muller make of the four words ``w`` of :func:`~ds_lowrank.linalg.philox.philox`. Its counter is (column div 4, row,
    0, 0), its key ``name_hash(seed, name, counter)``, low word first. In fp32::

        u_i = (w_i + 0.5) * 2**-32
        z_0, z_1 = sqrt(-2 ln u_0) * (cos, sin)(2 pi u_1)
        z_2, z_3 = sqrt(-2 ln u_2) * (cos, sin)(2 pi u_3)

    All devices have the same ``u`` and ``2 pi u``, but may round logarithms, cosines and sines differently.

    Args:
        seed: seed of the run.
        names: names of the parameters, one for each matrix.
        counter: tells apart the matrices of one parameter.
        rows: the first row and the one after the last, at most 2**32.
        columns: the first column and the one after the last, at most 2**34.
        device: where the matrices are drawn.

    Returns:
        len(names) x rows x columns, fp32, contiguous, on ``device``. Drawing needs little memory beside it.
    """
    return _draw(_normal, _keys(seed, tuple(names), counter, device), rows, columns)


def signs(
    seed: int,
    names: Sequence[str],
    counter: int | str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    device: torch.device,
) -> torch.Tensor:
    """Draw a part of each of the matrices of some parameters with entries -1 and 1, each with probability one half.

    As :func:`normal`, but the element at (row, column) is 1 if the highest bit of ``w_i`` is set, otherwise -1.

    Args:
        seed: seed of the run.
        names: names of the parameters, one for each matrix.
        counter: tells apart the matrices of one parameter.
        rows: the first row and the one after the last, at most 2**32.
        columns: the first column and the one after the last, at most 2**34.
        device: where the matrices are drawn.

    Returns:
        len(names) x rows x columns, fp32, contiguous, on ``device``. Drawing needs little memory beside it.
    """
    return _draw(_signs, _keys(seed, tuple(names), counter, device), rows, columns)


@lru_cache(maxsize=64)  # a projection is drawn again in every step of its interval
def _keys(seed: int, names: tuple[str, ...], counter: int | str, device: torch.device) -> torch.Tensor:
    """The two words of the key of each matrix: len(names) x 2, int64."""
    hashes = [name_hash(seed, name, counter) for name in names]
    return torch.tensor([(key & WORD, key >> 32) for key in hashes], dtype=torch.int64, device=device).view(-1, 2)


_Elements = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[torch.Tensor]]
"""Makes elements from keys, K x 2, rows, R, and blocks of four columns, B: those of index 0 to 3, K x R x B each."""


def _draw(elements: _Elements, keys: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
    """The elements of all keys, rows and columns, drawn a tile at a time."""
    count, (top, bottom), (left, right), device = len(keys), rows, columns, keys.device
    result = torch.empty(count, bottom - top, right - left, dtype=torch.float32, device=device)
    if not result.numel():
        return result
    lanes = LANES if device.type == "cpu" else DEVICE_LANES
    start, end = left // 4, -(-right // 4)  # blocks of four columns; the first and last may reach beyond the columns
    width = min(end - start, lanes)
    height = min(bottom - top, lanes // width)
    depth = min(count, lanes // (width * height))
    for k, r, b in product(range(0, count, depth), range(top, bottom, height), range(start, end, width)):
        row = torch.arange(r, min(r + height, bottom), dtype=torch.int64, device=device)
        block = torch.arange(b, min(b + width, end), dtype=torch.int64, device=device)
        target = result[k : k + depth, r - top : r - top + height]
        for i, part in enumerate(elements(keys[k : k + depth], row, block)):
            skipped = int(4 * b + i < left)
            place = target[:, :, 4 * (b + skipped) + i - left : 4 * (b + width) - left : 4]
            place.copy_(part[:, :, skipped : skipped + place.shape[2]])
    return result


@compiled_on_cuda
def _normal(keys: torch.Tensor, row: torch.Tensor, block: torch.Tensor) -> list[torch.Tensor]:
    """The normal elements of index 0 to 3 for all keys, rows and blocks, K x R x B each, fp32."""
    words, normals = _words(keys, row, block), []
    for i in (0, 2):
        radius = _uniform(words[i]).log_().mul_(-2).sqrt_()
        angle = _uniform(words[i + 1]).mul_(2 * math.pi)
        normals += [torch.cos(angle).mul_(radius), angle.sin_().mul_(radius)]
    return normals


def _uniform(word: torch.Tensor) -> torch.Tensor:
    """``(word + 0.5) * 2**-32``, fp32, never zero."""
    return word.to(torch.float32).add_(0.5).mul_(2**-32)


@compiled_on_cuda
def _signs(keys: torch.Tensor, row: torch.Tensor, block: torch.Tensor) -> list[torch.Tensor]:
    """The signs of index 0 to 3 for all keys, rows and blocks, K x R x B each, fp32."""
    return [(word >> 31).to(torch.float32).mul_(2).sub_(1) for word in _words(keys, row, block)]


def _words(keys: torch.Tensor, row: torch.Tensor, block: torch.Tensor) -> Words:
    """The random words of all keys, rows and blocks, four tensors K x R x B."""
    k0, k1 = keys.T[:, :, None, None]
    return philox((block, row[:, None], 0, 0), (k0, k1))
