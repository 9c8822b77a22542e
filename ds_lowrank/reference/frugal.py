"""FRUGAL (arXiv 2411.07837): dense, one process.

    every T steps    Q <- a new subspace, and moments of zero
    R <- H Q
    N <- Adam(R)                                    (or another inner optimizer)
    F <- sign(H - R Q^T), or H - R Q^T with ``sgd``
    W <- W - lr * scale * (N Q^T + c F)

H is G, or G^T if the rows are compressed: kept x compressed. Q is compressed x r. The sign of an element that is no
more than a rounding error of fp32 of its row is 0.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_lowrank.reference.galore import DenseGaLore, positive_qr
from ds_lowrank.reference.inner import make_inner
from ds_lowrank.reference.sketch import sketch

ROUNDING = 1e-6


class DenseFrugal(DenseGaLore):
    """FRUGAL on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; random matrices derive from it.
        lr: the learning rate of a step that is given none.
        scale: of both parts.
        projector: that of GaLore, ``random`` or ``columns``.
        moments: ``reset``, or that of GaLore.
        state_free: ``sign`` or ``sgd``.
        state_free_lr_scale: c.
        inner: the rule in the subspace.
        betas: its betas.
        eps: its epsilon.
        momentum: of ``sgd``.
        eps_root: beside which root ``eps`` stands.
        **options: those of :class:`~ds_lowrank.reference.galore.DenseGaLore`.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        *,
        scale: float = 1.0,
        projector: str = "randomized",
        moments: str = "reset",
        state_free: str = "sign",
        state_free_lr_scale: float = 1.0,
        inner: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.0,
        eps_root: str = "corrected",
        **options: Any,
    ) -> None:
        super().__init__(weight, name, lr, scale=scale, projector=projector, moments=moments, **options)
        self.rule = inner, betas, eps, momentum, "subspace", eps_root
        self.state_free, self.c = state_free, state_free_lr_scale
        self.inner = make_inner(*self.rule)

    def find_basis(self, G: torch.Tensor) -> torch.Tensor:
        """The subspace of the next T steps, compressed x r."""
        size = G.shape[1 if self.right else 0]
        if self.projector == "random":
            return positive_qr(sketch(self.seed, self.name, self.t, size, self.rank).to(G.dtype))
        if self.projector == "columns":
            keys = sketch(self.seed, self.name, self.t, size, 1).squeeze(1)
            return torch.eye(size, dtype=G.dtype)[:, keys.argsort()[: self.rank]]
        return super().find_basis(G)

    def refresh(self, G: torch.Tensor) -> None:
        """Find a new subspace; start the moments again, carry or keep them."""
        super().refresh(G)
        if self.moments == "reset":
            self.inner = make_inner(*self.rule)

    def update(self, H: torch.Tensor) -> torch.Tensor:
        """``scale (N Q^T + c F)``."""
        Q = self.basis
        R = H @ Q
        F = H - R @ Q.T
        if self.state_free == "sign":
            F = torch.where(F.abs() > ROUNDING * H.norm(dim=1, keepdim=True), F.sign(), 0.0)
        return self.scale * (self.inner.direction(R) @ Q.T + self.c * F)
