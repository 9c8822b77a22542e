"""Flora (arXiv 2402.03293) on Adafactor, as its authors' code runs it: dense, one process.

    every kappa steps    P_new <- a new N(0, 1/r), compressed x r;  M <- M P_old^T P_new
    v_row, v_col <- b v + (1 - b) (means of H^2 + 1e-30 over columns, over rows),   b = 1 - t^-0.8
    U <- H / sqrt(v_row v_col^T / mean(v_row));  U <- U / max(1, rms(U))            or U = H without a second moment
    D <- beta1 M P^T + (1 - beta1) U                                                or with U P P^T in place of U
    M <- beta1 M + (1 - beta1) U P
    W <- W - lr * max(1e-3, rms(W)) * D

H is G, or G^T if the rows are compressed: kept x compressed.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns
from ds_lowrank.reference.inner import Adafactor
from ds_lowrank.reference.sketch import sketch


class DenseFlora:
    """Flora on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; projections derive from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.Flora`, by the same names; ``eps`` is not used.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank: int = 256,
        kappa: int = 1000,
        second_moment: str = "factored",
        newest_term: str = "exact",
        scale_parameter: bool = True,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.kappa = weight, name, lr, kappa
        self.rank, self.right = min(rank, m, n), compresses_columns(proj_type, m, n)
        self.adafactor = Adafactor() if second_moment == "factored" else None
        self.projects_newest, self.scale_parameter = newest_term == "projected", scale_parameter
        self.beta1, self.weight_decay, self.seed, self.t = betas[0], weight_decay, seed, 0
        self.M = torch.zeros(())

    def projection(self, compressed: int, number: int) -> torch.Tensor:
        """P of an interval, compressed x r."""
        P = sketch(self.seed, self.name, number, compressed, self.rank).to(self.weight.dtype)
        scaled: torch.Tensor = P / self.rank**0.5
        return scaled

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        P = self.projection(H.shape[1], self.t // self.kappa)
        if self.t == 0:
            self.M = torch.zeros_like(H @ P)
        elif self.t % self.kappa == 0:
            self.M = self.M @ self.projection(H.shape[1], self.t // self.kappa - 1).T @ P
        U = H if self.adafactor is None else self.adafactor.direction(H)
        newest = U @ P @ P.T if self.projects_newest else U
        D = self.beta1 * self.M @ P.T + (1 - self.beta1) * newest
        self.M = self.beta1 * self.M + (1 - self.beta1) * U @ P
        size = max(1e-3, W.square().mean().sqrt().item()) if self.scale_parameter else 1.0
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * size * D)
        self.t += 1
