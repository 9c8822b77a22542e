"""Orthogonalizing a momentum ``M``: its polar factor ``U V^T``, exact or as near as Muon's iteration comes.

    exact             O = M (M^T M)^(-1/2),  a singular value that is rounding counts as zero (SUMO)
    newton_schulz     X <- M / |M|,  then five times X <- a X + b X X^T X + c X (X^T X)^2 (Muon)

A thin ``M``, kept x r, stays on the ranks that own its rows: both rules are ``O = M f(M^T M)`` with an r x r matrix f.
Neither rule has signs to choose, so that an update does not depend on where it is computed.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch

from ds_lowrank.linalg.orthonormal import RANK_TOLERANCE
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Program

Orthogonalization = Literal["exact", "newton_schulz"]
ShapeFactor = Literal["none", "original", "match_rms_adamw"]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of Muon's quintic, whose slope at zero is large: singular values end between about 0.7 and 1.2."""
STEPS = 5
EXACT_UNITS = (2.0**-16, 2.0**-32)
"""Multiples of these, of magnitude up to 1 and 2^-16, are added in fp32 without rounding, on up to 256 ranks."""


def orthogonalized(shard: MatrixShard, tall: torch.Tensor, rule: Orthogonalization) -> Program[torch.Tensor]:
    """Orthogonalize a thin matrix whose rows are spread over ranks.

    Args:
        shard: the stack.
        tall: ``M``: matrices x owned kept rows x r, fp32, of any size.
        rule: how.

    Returns:
        ``O``: matrices x owned kept rows x r, fp32; zero for a matrix of zeros.
    """
    columns = tall.shape[2]
    norm = torch.linalg.vector_norm(tall, dim=(1, 2), keepdim=True, dtype=torch.float64)
    bound = yield shard.all_reduce(norm)  # a sum of norms is at least the norm of all rows
    tall = tall / bound.clamp_min(torch.finfo(torch.float32).tiny)
    small = shard.replicated_axis(columns)
    gram = yield small.reduce_to_root(shard.local_contribution(exact_parts(tall.double().mT @ tall.double())))
    gram = torch.stack(gram.double().split(columns, dim=2)).sum(0)
    factor = inverse_root(gram) if rule == "exact" else newton_schulz_factor(gram)
    factor = shard.or_zeros((yield small.broadcast_from_root(factor.float())), columns)
    return tall @ factor


def exact_parts(gram: torch.Tensor) -> torch.Tensor:
    """Numbers in fp64 as three summands in fp32, of which all but the last can be summed over ranks without rounding.

    What is sent is fp32. The square of a singular value that is a thousand times smaller than the largest would be lost
    in the rounding of its sums.

    Args:
        gram: matrices x r x r, fp64, of magnitude at most 1.

    Returns:
        matrices x r x 3 r, fp32.
    """
    parts = []
    for unit in EXACT_UNITS:
        parts.append((gram / unit).round() * unit)
        gram = gram - parts[-1]
    return torch.cat([*parts, gram], dim=2).float()


def inverse_root(gram: torch.Tensor) -> torch.Tensor:
    """``(M^T M)^(-1/2)`` on the directions that ``M`` has, zero on the others.

    A direction whose singular value is below ``RANK_TOLERANCE`` of the largest is rounding, which would be noise of
    full size, different on every layout.

    Args:
        gram: ``M^T M``: matrices x r x r, fp64.

    Returns:
        matrices x r x r, fp64.
    """
    values, vectors = torch.linalg.eigh(gram)
    found = (values > 0) & (values > RANK_TOLERANCE**2 * values[:, -1:])
    roots = torch.where(found, values, 1.0).rsqrt() * found
    root: torch.Tensor = (vectors * roots.unsqueeze(1)) @ vectors.mT
    return root


def newton_schulz_factor(gram: torch.Tensor) -> torch.Tensor:
    """The matrix f for which ``M f`` is what :func:`newton_schulz` makes of ``M``.

    Args:
        gram: ``M^T M``: matrices x r x r, fp64.

    Returns:
        matrices x r x r, fp64.
    """
    a, b, c = COEFFICIENTS
    square = torch.diagonal(gram, dim1=1, dim2=2).sum(1).view(-1, 1, 1)  # |M|^2
    inverse = torch.where(square > 0, square, 1.0).reciprocal()
    gram, eye = gram * inverse, torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factor = eye * inverse.sqrt()
    for _ in range(STEPS):
        step = a * eye + b * gram + c * (gram @ gram)
        factor, gram = factor @ step, step @ gram @ step
    return factor


def newton_schulz(whole: torch.Tensor) -> torch.Tensor:
    """Muon's iteration (Jordan et al., 2024), in fp32 instead of bf16.

    Args:
        whole: matrices x rows x columns, fp32.

    Returns:
        Same shape, fp32: nearly the polar factor; zero for a matrix of zeros.
    """
    a, b, c = COEFFICIENTS
    x = whole / whole.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / torch.where(norm > 0, norm, 1.0)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if is_tall else x


def polar_factor(whole: torch.Tensor) -> torch.Tensor:
    """The polar factor ``U V^T``, without the directions that are rounding.

    Args:
        whole: matrices x rows x columns, fp32.

    Returns:
        Same shape, fp32; zero for a matrix of zeros.
    """
    x = whole.double() / whole.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if x.shape[1] < x.shape[2]:
        return (inverse_root(x @ x.mT) @ x).float()
    return (x @ inverse_root(x.mT @ x)).float()


def shape_factor(shard: MatrixShard, rule: ShapeFactor) -> float:
    """What Muon multiplies ``O`` by for the shape of the weights, m x n (output x input).

    Args:
        shard: the stack.
        rule: ``original``: ``sqrt(max(1, m / n))``. ``match_rms_adamw``: ``0.2 sqrt(max(m, n))``. ``none``: 1.
    """
    m, n = reversed(shard.shape) if shard.transposed else shard.shape
    match rule:
        case "original":
            return sqrt(max(1.0, m / n))
        case "match_rms_adamw":
            return 0.2 * sqrt(max(m, n))
    return 1.0
