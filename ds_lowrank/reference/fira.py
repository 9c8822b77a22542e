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
from ds_lowrank.reference.inner import AdamW

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
        ratio_moments: ``corrected``, or ``uncorrected``: phi is of Adam's direction before its bias correction.
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
        ratio_moments: str = "corrected",
        **options: Any,
    ) -> None:
        super().__init__(weight, name, lr, **options)
        self.limit, self.residual, self.scaling = norm_growth_limit, residual, scaling
        self.ratio_moments, self.previous = ratio_moments, 0.0

    def update(self, H: torch.Tensor) -> torch.Tensor:
        """``alpha N Q^T + S``."""
        Q, correction = self.basis, 1.0
        R = H @ Q
        N = self.inner.direction(R)
        if self.ratio_moments == "uncorrected":
            assert isinstance(self.inner, AdamW)
            correction = self.inner.correction
        over = (0, 1) if self.scaling == "matrix" else (1,)
        lengths = R.norm(dim=over, keepdim=True)
        is_rounding = lengths <= ROUNDING * H.norm(dim=over, keepdim=True)
        phi = torch.where(is_rounding, 0.0, N.norm(dim=over, keepdim=True) / correction / lengths)
        S = phi * (H - (1.0 if self.residual == "paper" else self.scale) * R @ Q.T)
        size = S.norm().item()
        if self.limit is not None and self.previous > 0 and size > self.limit * self.previous:
            S = S * (self.limit * self.previous / size)
        self.previous = S.norm().item()
        return self.scale * N @ Q.T + correction * S
