"""LDAdam as arXiv 2410.16103, Algorithm 1, writes it: dense, one process.

    a <- H + E                                                   E is zero without error feedback
    t = 0:  Q <- leading right singular vectors of a
    t > 0:  b <- rho m Q_old^T + (1 - rho) a                     with m = M / (1 - b1^t), v = V / (1 - b2^t)
            Q <- qr(b^T b Q_old),  C <- Q_old^T Q
            M' <- M C,  V' <- (1 - b2^t) |(v - m^2) C^2 + (m C)^2|
    R <- a Q
    E <- a - R Q^T + b1 / (1 - b1) (M Q_old^T - M' Q^T)
    M <- b1 M' + (1 - b1) R,  V <- b2 V' + (1 - b2) R^2
    N <- M / (1 - b1^(t+1)) / (sqrt(V / (1 - b2^(t+1))) + eps)
    W <- W - lr * scale * N Q^T - lr * weight_decay * W

H is G, or G^T if the rows are compressed: kept x compressed. Q is compressed x r. Squares, roots and magnitudes are
taken element by element.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns, leading_basis, positive_qr
from ds_lowrank.reference.inner import AdamW
from ds_lowrank.reference.sketch import sketch


class ProjectionAwareAdamW(AdamW):
    """Adam whose moments are carried into another basis as estimates of a mean and of a variance."""

    def rotate(self, C: torch.Tensor) -> None:
        """Carry M exactly, and V as mean square of a mean that is turned and of a variance that is spread."""
        beta1, beta2 = self.betas
        m, v = self.M / (1 - beta1**self.t), self.V / (1 - beta2**self.t)
        self.V = (1 - beta2**self.t) * ((v - m**2) @ C**2 + (m @ C) ** 2).abs()
        self.M = self.M @ C


class DenseLDAdam:
    """LDAdam on one matrix. A step whose ``a`` is zero keeps the basis.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; the sketch of the first basis derives from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.LDAdam`, by the same names.
    """

    basis: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-3,
        rank: int = 16,
        rho: float = 0.908,
        error_feedback: bool = False,
        projector: str = "randomized",
        scale: float = 1.0,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.scale, self.rho = weight, name, lr, scale, rho
        self.rank, self.projector, self.error_feedback = min(rank, m, n), projector, error_feedback
        self.right = compresses_columns(proj_type, m, n)
        self.weight_decay, self.seed, self.betas = weight_decay, seed, betas
        self.adam, self.t = ProjectionAwareAdamW(betas, eps), 0
        self.E = torch.zeros(())

    def first_basis(self, G: torch.Tensor) -> torch.Tensor:
        """A basis of the first gradient's leading subspace, compressed x r."""
        W = sketch(self.seed, self.name, 0, G.shape[1 if self.right else 0], self.rank)
        return leading_basis(G, W, self.right, self.projector)

    def next_basis(self, a: torch.Tensor) -> torch.Tensor:
        """One block power iteration, from the basis of the step before."""
        m = self.adam.M / (1 - self.betas[0] ** self.t)
        b = self.rho * m @ self.basis.T + (1 - self.rho) * a
        return positive_qr(b.T @ (b @ self.basis))

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        a = H + self.E
        momentum = torch.zeros_like(a)
        if self.t == 0:
            self.basis = self.first_basis(G)
        elif a.any():
            new = self.next_basis(a)
            momentum = self.adam.M @ self.basis.T
            self.adam.rotate(self.basis.T @ new)
            momentum -= self.adam.M @ new.T
            self.basis = new
        R = a @ self.basis
        if self.error_feedback:
            beta1 = self.betas[0]
            self.E = a - R @ self.basis.T + beta1 / (1 - beta1) * momentum
        update = self.adam.update(R, self.basis)
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * self.scale * update)
        self.t += 1
