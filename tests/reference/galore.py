"""GaLore as its paper writes it: dense, one process, nothing shared with the package but the sketch's definition.

Algorithm 2 of arXiv 2403.03507 with R = P^T G (left) or R = G Q (right), textbook Adam, decoupled weight decay as in
AdamW.
"""

import hashlib

import torch


def sketch(seed, name, counter, rows, columns):
    """The package's random sketch, written down again: a normal matrix from SHA-256 of (seed, name, counter)."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{counter}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(rows, columns, generator=generator)


def positive_qr(matrix):
    q, r = torch.linalg.qr(matrix)
    return q * torch.sign(torch.diagonal(r))


class DenseGaLore:
    """One matrix. ``step`` changes ``weight`` in place."""

    def __init__(
        self,
        weight,
        name="w",
        lr=1e-2,
        rank=4,
        update_proj_gap=200,
        scale=0.25,
        proj_type="std",
        projector="randomized",
        moments="keep",
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        seed=0,
    ):
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap, self.scale = weight, name, lr, update_proj_gap, scale
        self.rank, self.projector, self.moments = min(rank, m, n), projector, moments
        self.betas, self.eps, self.weight_decay, self.seed = betas, eps, weight_decay, seed
        self.right = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}[proj_type]
        self.t, self.basis, self.M, self.V = 0, None, 0.0, 0.0

    def find_basis(self, G):
        if self.projector == "svd":
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            return Vh[: self.rank].T if self.right else U[:, : self.rank]
        H = G if self.right else G.T
        W = sketch(self.seed, self.name, self.t, H.shape[1], self.rank)
        return positive_qr(H.T @ positive_qr(H @ W))

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        beta1, beta2 = self.betas
        if self.t % self.gap == 0:
            old, self.basis = self.basis, self.find_basis(G)
            if self.moments == "rotate" and old is not None:
                rotation = old.T @ self.basis
                if self.right:
                    self.M, self.V = self.M @ rotation, self.V @ rotation**2
                else:
                    self.M, self.V = rotation.T @ self.M, (rotation**2).T @ self.V
        self.t += 1
        Q = self.basis
        R = G @ Q if self.right else Q.T @ G
        self.M = beta1 * self.M + (1 - beta1) * R
        self.V = beta2 * self.V + (1 - beta2) * R**2
        N = (self.M / (1 - beta1**self.t)) / ((self.V / (1 - beta2**self.t)).sqrt() + self.eps)
        lifted = N @ Q.T if self.right else Q @ N
        self.weight.mul_(1 - lr * self.weight_decay)
        self.weight.sub_(lr * self.scale * lifted)


class DenseAdamW:
    """AdamW on one tensor (Loshchilov and Hutter, Algorithm 2), for everything that is not projected."""

    def __init__(self, weight, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
        self.weight, self.lr, self.betas, self.eps, self.weight_decay = weight, lr, betas, eps, weight_decay
        self.t, self.M, self.V = 0, 0.0, 0.0

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        beta1, beta2 = self.betas
        self.t += 1
        self.M = beta1 * self.M + (1 - beta1) * G
        self.V = beta2 * self.V + (1 - beta2) * G**2
        self.weight.mul_(1 - lr * self.weight_decay)
        self.weight.sub_(lr * (self.M / (1 - beta1**self.t)) / ((self.V / (1 - beta2**self.t)).sqrt() + self.eps))
