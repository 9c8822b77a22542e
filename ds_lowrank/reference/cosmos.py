"""COSMOS from the equations of arXiv 2502.17410: dense, one process.

    M <- b1 M + (1 - b1) H
    t = 0:  Q <- leading right singular vectors of H
    t > 0:  Q <- qr(b3 Q S + (1 - b3) H^T H Q)                   with the Q of the step before
    S <- b3 C^T S C + (1 - b3) (H Q)^T (H Q)                     with C = Q_old^T Q; S is zero before
    V <- b2 V + (1 - b2) (H Q)^2
    L <- M / (1 - b1^(t+1))                                      or (b1 M + (1 - b1) H) / (1 - b1^(t+2)) with nesterov
    A <- L Q / (sqrt(V / (1 - b2^(t+1))) + eps) Q^T
    B <- NS(L - L Q Q^T) / |NS(L - L Q Q^T)|
    U <- A + gamma sqrt(m n) B
    W <- W - lr * scale * sqrt(m n) U / |U|

H is G, or G^T if the rows are compressed: kept x compressed. Q is compressed x r. Squares, roots and quotients are
taken element by element; NS is Muon's iteration.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns, leading_basis, positive_qr
from ds_lowrank.reference.gum import newton_schulz
from ds_lowrank.reference.sketch import sketch


class DenseCosmos:
    """COSMOS on one matrix. A step whose gradient is zero keeps the basis.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; the sketch of the first basis derives from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.Cosmos`, by the same names.
    """

    basis: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-3,
        rank: int = 64,
        beta3: float | None = None,
        gamma: float = 0.2,
        nesterov: bool = True,
        projector: str = "randomized",
        scale: float = 0.2,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.scale = weight, name, lr, scale
        self.rank, self.gamma, self.nesterov, self.projector = min(rank, m, n), gamma, nesterov, projector
        self.beta1, self.beta2 = betas
        self.beta3 = self.beta2 if beta3 is None else beta3
        self.right, self.size = compresses_columns(proj_type, m, n), float(m * n) ** 0.5
        self.eps, self.weight_decay, self.seed, self.t = eps, weight_decay, seed, 0
        self.M = self.V = torch.zeros(())
        self.S = weight.new_zeros(self.rank, self.rank)

    def first_basis(self, G: torch.Tensor) -> torch.Tensor:
        """A basis of the first gradient's leading subspace, compressed x r."""
        W = sketch(self.seed, self.name, 0, G.shape[1 if self.right else 0], self.rank)
        return leading_basis(G, W, self.right, self.projector)

    def move_basis(self, G: torch.Tensor, H: torch.Tensor) -> None:
        """One power iteration on the average of ``H^T H``, which S stands for in the old subspace."""
        if self.t == 0:
            self.basis = self.first_basis(G)
        elif H.any():
            Q = positive_qr(self.beta3 * self.basis @ self.S + (1 - self.beta3) * H.T @ (H @ self.basis))
            C = self.basis.T @ Q
            self.S, self.basis = C.T @ self.S @ C, Q
        R = H @ self.basis
        self.S = self.beta3 * self.S + (1 - self.beta3) * R.T @ R

    def of_rest(self, L: torch.Tensor) -> torch.Tensor:
        """B; zero if there is nothing outside of the subspace but rounding."""
        Q = torch.linalg.qr(self.basis.double()).Q  # in fp64: NS would enlarge what rounding leaves of L Q Q^T
        rest = L.double() - L.double() @ Q @ Q.T
        if rest.norm() <= 1e-5 * L.double().norm():
            return torch.zeros_like(L)
        B = newton_schulz(rest)
        return torch.div(B, B.norm()).to(L.dtype)

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        self.move_basis(G, H)
        self.t += 1
        self.M = self.beta1 * self.M + (1 - self.beta1) * H
        self.V = self.beta2 * self.V + (1 - self.beta2) * (H @ self.basis) ** 2
        if self.nesterov:
            L = (self.beta1 * self.M + (1 - self.beta1) * H) / (1 - self.beta1 ** (self.t + 1))
        else:
            L = self.M / (1 - self.beta1**self.t)
        A = L @ self.basis / ((self.V / (1 - self.beta2**self.t)).sqrt() + self.eps) @ self.basis.T
        U = A + self.gamma * self.size * self.of_rest(L)
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * self.scale * self.size * U / max(U.norm().item(), 1e-300))
