"""Fira as arXiv 2410.01623, Algorithm 1, writes it: dense, one process.

    every T steps    Q <- leading right singular vectors of H
    R <- H Q
    N <- Adam(R)                         (or another inner optimizer)
    phi_i <- |N_i| / |R_i|               for each row i; ``matrix``: one phi = |N| / |R|
    S <- diag(phi) (H - R Q^T)           ``official``: H - alpha R Q^T
    S <- S * gamma |S_before| / |S|      if |S| > gamma |S_before|
    W <- W - lr * (alpha * N Q^T + S)

H is G, or G^T if the rows are compressed: kept x compressed. A row that has no more of R than a rounding error of fp32
has phi_i = 0.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_lowrank.reference.galore import DenseGaLore

ROUNDING = 1e-6


class DenseFira(DenseGaLore):
    """Fira on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; random matrices derive from it.
        lr: the learning rate of a step that is given none.
        norm_growth_limit: gamma, or None for no limiter.
        residual: ``paper`` or ``official``.
        scaling: ``channel`` or ``matrix``.
        **options: those of :class:`~ds_lowrank.reference.galore.DenseGaLore`.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        *,
        norm_growth_limit: float | None = 1.01,
        residual: str = "paper",
        scaling: str = "channel",
        **options: Any,
    ) -> None:
        super().__init__(weight, name, lr, **options)
        self.limit, self.residual, self.scaling, self.previous = norm_growth_limit, residual, scaling, 0.0

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        if self.t % self.gap == 0:
            self.refresh(G)
        Q = self.basis
        R = H @ Q
        N = self.inner.direction(R)
        over = (0, 1) if self.scaling == "matrix" else (1,)
        lengths = R.norm(dim=over, keepdim=True)
        is_rounding = lengths <= ROUNDING * H.norm(dim=over, keepdim=True)
        phi = torch.where(is_rounding, 0.0, N.norm(dim=over, keepdim=True) / lengths)
        S = phi * (H - (1.0 if self.residual == "paper" else self.scale) * R @ Q.T)
        size = S.norm().item()
        if self.limit is not None and self.previous > 0 and size > self.limit * self.previous:
            S = S * (self.limit * self.previous / size)
        self.previous = S.norm().item()
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * (self.scale * N @ Q.T + S))
        self.t += 1
