"""Online Subspace Descent as its paper writes it (arXiv 2408.12857, Algorithm 1, Equation 6): dense, one process."""

import torch

from ds_lowrank.reference.galore import compresses_columns, positive_qr, randomized_basis, singular_basis, sketch
from ds_lowrank.reference.inner import make_inner


def pca_loss(Q, G, pca_lambda):
    """Equation 6 for a normalised gradient G, kept x compressed, and Q, compressed x r."""
    identity = torch.eye(Q.shape[1], dtype=Q.dtype)
    return (G - G @ Q @ Q.T).square().sum() + pca_lambda * (Q.T @ Q - identity).square().sum()


def pca_gradient(Q, G, pca_lambda):
    with torch.enable_grad():
        Q = Q.detach().requires_grad_()
        return torch.autograd.grad(pca_loss(Q, G, pca_lambda), Q)[0]


class DenseOnlineSubspaceDescent:
    """One matrix. ``step`` changes ``weight`` in place."""

    def __init__(
        self,
        weight,
        name="w",
        lr=1e-2,
        rank=128,
        scale=0.25,
        proj_type="std",
        inner="adamw",
        momentum=0.0,
        lion_sign="subspace",
        pca_lambda=0.1,
        basis_lr_ratio=5.0,
        basis_optimizer="adam",
        basis_init="randomized",
        basis_weight_decay=None,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        seed=0,
    ):
        m, n = weight.shape
        self.weight, self.name, self.lr, self.scale = weight, name, lr, scale
        self.rank, self.right = min(rank, m, n), compresses_columns(proj_type, m, n)
        self.pca_lambda, self.basis_lr_ratio, self.basis_init = pca_lambda, basis_lr_ratio, basis_init
        self.weight_decay, self.seed = weight_decay, seed
        self.basis_weight_decay = weight_decay if basis_weight_decay is None else basis_weight_decay
        self.inner = make_inner(inner, betas, eps, momentum, lion_sign)
        self.inner_basis_optimizer = make_inner("adamw" if basis_optimizer == "adam" else basis_optimizer, betas, eps)
        self.t, self.basis = 0, None

    def first_basis(self, G):
        if self.basis_init == "svd":
            return singular_basis(G, self.rank, self.right)
        H = G if self.right else G.T
        W = sketch(self.seed, self.name, 0, H.shape[1], self.rank).to(G.dtype)
        return {"random": lambda: positive_qr(W), "randomized": lambda: randomized_basis(H, W)}[self.basis_init]()

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        if self.t == 0:
            self.basis = self.first_basis(G)
        update = self.inner.update(H @ self.basis, self.basis)
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * self.scale * update)
        read_off_this_gradient = self.t == 0 and self.basis_init != "random"
        if H.any() and not read_off_this_gradient:
            self.improve_basis(H, self.basis_lr_ratio * lr)
        self.t += 1

    def improve_basis(self, H, lr):
        D = self.inner_basis_optimizer.direction(pca_gradient(self.basis, H / H.norm(), self.pca_lambda))
        self.basis = (1 - lr * self.basis_weight_decay) * self.basis - lr * D
