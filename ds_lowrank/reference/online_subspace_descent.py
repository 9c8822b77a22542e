"""Online Subspace Descent as arXiv 2408.12857, Algorithm 1, writes it: dense, one process.

    R <- H Q
    N <- Adam(R)                         (or another inner optimizer)
    W <- W - lr * scale * N Q^T
    L(Q) = |H - H Q Q^T|^2 / |H|^2 + lambda |Q^T Q - I|^2                      (Equation 6)
    Q <- Q - lr_P Adam_P(grad L(Q))      with lr_P = basis_lr_ratio * lr

or, with basis_optimizer ``random``, without a loss:

    every T steps    Q <- the orthonormal factor of a new normal matrix

H is G, or G^T if the rows are compressed: kept x compressed. Q is compressed x r.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns, positive_qr, randomized_basis, singular_basis
from ds_lowrank.reference.inner import make_inner
from ds_lowrank.reference.sketch import sketch


def pca_loss(Q: torch.Tensor, G: torch.Tensor, pca_lambda: float) -> torch.Tensor:
    """Equation 6 as a scalar, for a gradient G that is divided by a norm, kept x compressed, and Q, compressed x r."""
    identity = torch.eye(Q.shape[1], dtype=Q.dtype)
    return (G - G @ Q @ Q.T).square().sum() + pca_lambda * (Q.T @ Q - identity).square().sum()


def pca_gradient(Q: torch.Tensor, G: torch.Tensor, pca_lambda: float) -> torch.Tensor:
    """The gradient of Equation 6 with respect to Q, compressed x r, by autograd."""
    with torch.enable_grad():
        Q = Q.detach().requires_grad_()
        return torch.autograd.grad(pca_loss(Q, G, pca_lambda), Q)[0]


class DenseOnlineSubspaceDescent:
    """Online Subspace Descent on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; sketches derive from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.OnlineSubspaceDescent`, by the same names.
    """

    basis: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank: int = 128,
        scale: float = 0.25,
        proj_type: str = "std",
        inner: str = "adamw",
        momentum: float = 0.0,
        lion_sign: str = "subspace",
        pca_lambda: float = 0.1,
        basis_lr_ratio: float = 5.0,
        basis_optimizer: str = "adam",
        basis_betas: tuple[float, float] | None = None,
        update_proj_gap: int = 200,
        basis_init: str = "randomized",
        pca_norm: str = "gradient",
        basis_weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.scale = weight, name, lr, scale
        self.rank, self.right = min(rank, m, n), compresses_columns(proj_type, m, n)
        self.pca_lambda, self.basis_lr_ratio, self.basis_init = pca_lambda, basis_lr_ratio, basis_init
        self.pca_norm = pca_norm
        self.weight_decay, self.seed, self.t = weight_decay, seed, 0
        self.basis_weight_decay = weight_decay if basis_weight_decay is None else basis_weight_decay
        self.inner = make_inner(inner, betas, eps, momentum, lion_sign)
        self.is_random, self.update_proj_gap = basis_optimizer == "random", update_proj_gap
        rule = "adamw" if basis_optimizer == "adam" else basis_optimizer
        self.basis_optimizer = make_inner(rule, betas if basis_betas is None else basis_betas, eps)

    def first_basis(self, G: torch.Tensor) -> torch.Tensor:
        """The basis of the first step, compressed x r."""
        if self.basis_init == "svd":
            return singular_basis(G, self.rank, self.right)
        H = G if self.right else G.T
        W = sketch(self.seed, self.name, 0, H.shape[1], self.rank).to(G.dtype)
        return positive_qr(W) if self.basis_init == "random" else randomized_basis(H, W)

    def improve_basis(self, H: torch.Tensor, lr: float) -> None:
        """Take one step on the basis at its own learning rate."""
        norm = H.norm() if self.pca_norm == "gradient" else (H @ self.basis).norm()
        D = self.basis_optimizer.direction(pca_gradient(self.basis, H / norm, self.pca_lambda))
        self.basis = (1 - lr * self.basis_weight_decay) * self.basis - lr * D

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        if self.is_random and self.t % self.update_proj_gap == 0:
            drawn = sketch(self.seed, self.name, self.t // self.update_proj_gap, H.shape[1], self.rank)
            self.basis = positive_qr(drawn.to(G.dtype))
        elif self.t == 0:
            self.basis = self.first_basis(G)
        update = self.inner.update(H @ self.basis, self.basis)
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * self.scale * update)
        found_in_this_gradient = self.t == 0 and self.basis_init != "random"
        if H.any() and not found_in_this_gradient and not self.is_random:
            self.improve_basis(H, self.basis_lr_ratio * lr)
        self.t += 1
