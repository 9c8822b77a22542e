"""Random matrices by their definition: Philox4x32-10 (Salmon et al., SC 2011) and Box and Muller's transform.

    (w0, w1, w2, w3) <- Philox(counter = (column div 4, row, 0, 0), key = 64 bits of SHA-256 of (seed, name, counter))
    u_i    <- (w_i + 1/2) / 2^32
    z0, z1 <- sqrt(-2 ln u0) (cos, sin)(2 pi u1)
    z2, z3 <- sqrt(-2 ln u2) (cos, sin)(2 pi u3)

with u and 2 pi u in fp32, whose roundings are standardised, so that all devices take functions of the same numbers.
Element (row, column) is z_i with i = column mod 4, or 1 if w_i >= 2^31 and else -1.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint64]


def sketch(seed: int, name: str, counter: int | str, rows: int, columns: int) -> torch.Tensor:
    """A standard normal matrix, rows x columns, fp32, as a function of (seed, name, counter)."""
    w = words(seed, name, counter, rows, columns).astype(np.float32)
    u = (w + np.float32(0.5)) / np.float32(2**32)
    angle = (np.float32(2 * np.pi) * u[..., 1::2]).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u[..., 0::2].astype(np.float64)))
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return torch.from_numpy(z.reshape(rows, -1)[:, :columns].astype(np.float32))


def sign_sketch(seed: int, name: str, counter: int | str, rows: int, columns: int) -> torch.Tensor:
    """A matrix of signs, rows x columns, fp32, as a function of (seed, name, counter)."""
    w = words(seed, name, counter, rows, columns).reshape(rows, -1)[:, :columns]
    return torch.from_numpy(np.where(w >= 2**31, 1, -1).astype(np.float32))


def words(seed: int, name: str, counter: int | str, rows: int, columns: int) -> Words:
    """The words of all elements: rows x (columns / 4, rounded up) x 4."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{counter}".encode()).digest()
    key = int.from_bytes(digest[:8], "little") >> 1
    row, block = np.indices((rows, -(-columns // 4)), dtype=np.uint64)
    zero = np.zeros_like(row)
    return np.stack(philox((block, row, zero, zero), (key % 2**32, key // 2**32)), axis=-1)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Ten rounds on four words; two words of the key."""
    (c0, c1, c2, c3), (k0, k1), word = counter, key, np.uint64(2**32)
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = product1 // word ^ c1 ^ np.uint64(k0), product0 // word ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 % word, product0 % word
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3
