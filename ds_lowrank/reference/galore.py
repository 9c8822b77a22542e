"""GaLore as its paper writes it: dense, one process, nothing shared with the package but the sketch's definition.

Algorithm 2 of arXiv 2403.03507 with textbook Adam, or another inner rule, and decoupled weight decay as in AdamW. One
orientation serves both sides: H is G (right) or G^T (left), kept x compressed; Q is compressed x r and R = H Q.
"""

import hashlib

import torch

from ds_lowrank.reference.inner import make_inner


def sketch(seed, name, counter, rows, columns):
    """The package's random sketch, written down again: a normal matrix from SHA-256 of (seed, name, counter)."""
    return torch.randn(rows, columns, generator=sketch_generator(seed, name, counter))


def sketch_generator(seed, name, counter):
    digest = hashlib.sha256(f"{seed}\0{name}\0{counter}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def positive_qr(matrix):
    q, r = torch.linalg.qr(matrix)
    return q * torch.sign(torch.diagonal(r))


def compresses_columns(proj_type, m, n):
    return {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}[proj_type]


def singular_basis(G, rank, right):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return Vh[:rank].T if right else U[:, :rank]


def randomized_basis(H, W):
    """Range finder with one power step from the sketch W, compressed x k."""
    return positive_qr(H.T @ positive_qr(H @ W.to(H.dtype)))


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
        inner="adamw",
        momentum=0.0,
        lion_sign="subspace",
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        seed=0,
    ):
        m, n = weight.shape
        if inner == "adafactor" and moments == "rotate":
            raise ValueError("moments='rotate' needs moments of R; adafactor has none: use moments='keep'")
        self.weight, self.name, self.lr, self.gap, self.scale = weight, name, lr, update_proj_gap, scale
        self.rank, self.projector, self.moments = min(rank, m, n), projector, moments
        self.weight_decay, self.seed = weight_decay, seed
        self.right = compresses_columns(proj_type, m, n)
        self.inner = make_inner(inner, betas, eps, momentum, lion_sign)
        self.t, self.basis = 0, None

    def find_basis(self, G):
        if self.projector == "svd":
            return singular_basis(G, self.rank, self.right)
        H = G if self.right else G.T
        return randomized_basis(H, sketch(self.seed, self.name, self.t, H.shape[1], self.rank))

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        if self.t % self.gap == 0:
            old, self.basis = self.basis, self.find_basis(G)
            if self.moments == "rotate" and old is not None:
                self.inner.rotate(old.T @ self.basis)
        Q = self.basis
        update = self.inner.update(H @ Q, Q)
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * self.scale * update)
        self.t += 1


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
