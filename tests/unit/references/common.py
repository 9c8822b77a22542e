"""What the tests of the dense references share: matrices in fp64, and bounds for them."""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import positive_qr

NEGLIGIBLE = 1e-30
"""An epsilon that no value here comes near."""
ROUNDING = 1e-10
"""Far above a few hundred roundings of fp64 (1e-16 each) in values near one, far below any real difference."""

SIDES = {"right": (12, 8), "left": (8, 12)}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=ROUNDING):
    return (a - b).norm() <= tolerance * b.norm()


def matrix_with(singular_values, m=12, n=8):
    u, v = (
        positive_qr(gaussian(m, len(singular_values), seed=1)),
        positive_qr(gaussian(n, len(singular_values), seed=2)),
    )
    return (u * torch.tensor(singular_values, dtype=torch.float64)) @ v.T


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)
