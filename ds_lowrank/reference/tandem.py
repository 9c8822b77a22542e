"""Tandem, dense, one process: momentum in the gradient's leading subspace, the gradient's rows outside of it.

    every T steps    Q <- leading right singular subspace of H,  M <- M Q_old^T Q
    R <- H Q,  M <- beta M + (1 - beta) R
    N <- U V^T of beta M + (1 - beta) R = U S V^T
    E_i <- (H_i - R_i Q^T) / |H_i - R_i Q^T|                for each row i
    X <- N Q^T + c sqrt((d - r) / D) E                     D rows
    W <- W - lr * scale * 0.2 sqrt(D d / (r + c^2 (d - r))) X - lr * weight_decay * W

The step's root mean square, lr * scale * 0.2, is at most tau times that of W, or tau / 1000 if W is smaller than that.
H is G, or G^T if the rows are compressed: kept x compressed, D x d. A row of the rest that is a rounding error of that
of H is zero. If the larger side is compressed, the smaller one takes the place of d: a gradient has no more dimensions.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns, randomized_basis
from ds_lowrank.reference.sketch import sketch
from ds_lowrank.reference.sumo import polar_factor


def rows_of_one_length(E: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Every row of E over its length; zero where it is a rounding error of that of H."""
    squares, whole = (x.double().square().sum(1, keepdim=True) for x in (E, H))
    rows: torch.Tensor = torch.where(squares > 1e-6 * whole, E / squares.clamp_min(1e-300).sqrt(), 0.0).to(E.dtype)
    return rows


class DenseTandem:
    """Tandem on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; sketches derive from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.Tandem`, by the same names.
    """

    Q: torch.Tensor
    M: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank: int = 128,
        update_proj_gap: int = 25,
        momentum: float = 0.9,
        rest_weight: float = 2.0,
        scale: float = 1.0,
        max_relative_step: float | None = 0.05,
        power_steps: int = 1,
        proj_type: str = "std",
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap, self.scale = weight, name, lr, update_proj_gap, scale
        self.rank, self.beta, self.c, self.power_steps = min(rank, m, n), momentum, rest_weight, power_steps
        self.tau = max_relative_step
        self.right, self.weight_decay, self.seed, self.t = compresses_columns(proj_type, m, n), weight_decay, seed, 0

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n. With a gradient of zeros the old basis stays."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        r, d, size = self.rank, min(H.shape), H.numel()
        if self.t % self.gap == 0 and (self.t == 0 or H.any()):
            start = sketch(self.seed, self.name, self.t, H.shape[1 if self.power_steps else 0], r)
            new = randomized_basis(H, start, self.power_steps)
            self.M = self.M @ (self.Q.T @ new) if self.t else torch.zeros(H.shape[0], r, dtype=H.dtype)
            self.Q = new
        R = H @ self.Q
        self.M = self.beta * self.M + (1 - self.beta) * R
        N = polar_factor(self.beta * self.M + (1 - self.beta) * R)
        X = N @ self.Q.T
        if d > r and self.c:
            X = X + self.c * ((d - r) / H.shape[0]) ** 0.5 * rows_of_one_length(H - R @ self.Q.T, H)
        length = lr * self.scale * 0.2
        if self.tau is not None:
            length = min(length, self.tau * max(1e-3, float(W.double().square().mean().sqrt())))
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(length * (size / (r + self.c**2 * (d - r))) ** 0.5 * X)
        self.t += 1
