"""GUM from the equations of arXiv 2510.17802: dense, one process.

    every K steps    P <- leading subspace of H,  M <- 0,  whole <- u < q  with u uniform in [0, 1)
    low rank         M <- beta M + H P / (1 - q),            W <- W - lr * scale * NS(M) P^T
    whole            M <- beta M + (H - H P P^T) / q,        W <- W - lr * scale * NS(M)
    q = 1 (Muon)     M <- beta M + H,                        W <- W - lr * scale * NS(M)

    NS(M)            X <- M / |M|;  five times  X <- a X + b (X X^T) X + c (X X^T)^2 X

H is G, or G^T if the rows are compressed: kept x compressed. P is compressed x r.
"""

from __future__ import annotations

import hashlib

import torch

from ds_lowrank.reference.galore import compresses_columns, leading_basis
from ds_lowrank.reference.sketch import sketch
from ds_lowrank.reference.sumo import polar_factor


def newton_schulz(M: torch.Tensor) -> torch.Tensor:
    """Muon's five steps with a = 3.4445, b = -4.7750, c = 2.0315, in fp64."""
    X: torch.Tensor = M.double() / max(M.double().norm().item(), 1e-300)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    return X.to(M.dtype)


def uniform(*parts: str | int) -> float:
    """A number in [0, 1) that is a function of some names and counters."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 1) / 2**63


class DenseGum:
    """GUM on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; sketches and coins derive from it.
        lr: the learning rate of a step that is given none.
        eps: not used.

    The other arguments are the options of :class:`ds_lowrank.Gum`, by the same names.

    Attributes:
        whole: whether the matrix is stepped whole in this period.
    """

    basis: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank: int = 128,
        update_proj_gap: int = 200,
        full_share: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = False,
        orthogonalization: str = "newton_schulz",
        projector: str = "randomized",
        adjust_lr_fn: str = "none",
        scale: float = 1.0,
        proj_type: str = "std",
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap, self.scale = weight, name, lr, update_proj_gap, scale
        self.rank, self.q, self.beta, self.nesterov = min(rank, m, n), full_share, momentum, nesterov
        self.orthogonalize = newton_schulz if orthogonalization == "newton_schulz" else polar_factor
        self.projector, self.right = projector, compresses_columns(proj_type, m, n)
        by_shape = {"none": 1.0, "original": max(1.0, m / n) ** 0.5, "match_rms_adamw": 0.2 * max(m, n) ** 0.5}
        self.shape_factor = by_shape[adjust_lr_fn]
        self.weight_decay, self.seed = weight_decay, seed
        self.t, self.whole, self.M = 0, full_share == 1, torch.zeros(())

    def begin_period(self, G: torch.Tensor, H: torch.Tensor) -> None:
        """A new subspace, a new coin, a new momentum."""
        W = sketch(self.seed, self.name, self.t, H.shape[1], self.rank)
        self.basis = leading_basis(G, W, self.right, self.projector)
        self.whole = uniform("full_share", self.seed, self.name, self.t // self.gap) < self.q
        self.M = torch.zeros(())

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        if self.q < 1 and self.t % self.gap == 0 and H.any():
            self.begin_period(G, H)
        if self.q == 1:
            added = H
        elif self.whole:
            P = torch.linalg.qr(self.basis.double()).Q  # in fp64: NS would enlarge what rounding leaves of H P P^T
            added = (H - H.double() @ P @ P.T) / self.q
        else:
            added = H @ self.basis / (1 - self.q)
        self.M = self.beta * self.M + added
        update = self.orthogonalize(added + self.beta * self.M if self.nesterov else self.M)
        if not self.whole:
            update = update @ self.basis.T
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * self.scale * self.shape_factor * update)
        self.t += 1
