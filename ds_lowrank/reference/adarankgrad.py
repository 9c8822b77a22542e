"""AdaRankGrad from its blocks (arXiv 2410.17881): dense, one process.

A randomized range finder, the smallest rank that leaves at most ``residual_tol`` of the gradient's energy outside,
moments carried by Q_old^T Q_new, and Adam in the subspace until the projected gradient is small.
"""

import torch

from ds_lowrank.reference.galore import compresses_columns, positive_qr, randomized_basis, sketch
from ds_lowrank.reference.inner import AdamW

CARRY = {
    "abs": lambda V, rotation: (V @ rotation).abs(),
    "clamp": lambda V, rotation: (V @ rotation).clamp(min=0),
    "squared": lambda V, rotation: V @ rotation**2,
}


class DenseAdaRankGrad:
    """One matrix. ``step`` changes ``weight`` in place.

    ``rank`` is the present one, ``age`` the steps done in this subspace, ``refreshes`` the subspaces so far.
    """

    def __init__(
        self,
        weight,
        name="w",
        lr=1e-2,
        rank_max=128,
        rank_min=1,
        residual_tol=0.2,
        rank_multiple=1,
        never_grow=False,
        grad_norm_tol=1e-4,
        update_proj_gap=200,
        second_moment="squared",
        scale=0.25,
        proj_type="std",
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        seed=0,
    ):
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap, self.scale = weight, name, lr, update_proj_gap, scale
        self.rank_max, self.rank_min, self.rank_multiple = min(rank_max, m, n), rank_min, rank_multiple
        self.residual_tol, self.never_grow, self.grad_norm_tol = residual_tol, never_grow, grad_norm_tol
        self.carry, self.right = CARRY[second_moment], compresses_columns(proj_type, m, n)
        self.weight_decay, self.seed, self.adam = weight_decay, seed, AdamW(betas, eps)
        self.basis, self.rank, self.t, self.age, self.converged, self.refreshes = None, 0, 0, 0, False, 0

    def choose_rank(self, H, s):
        """From the singular values of the gradient inside the range finder's subspace, largest first."""
        energy = H.double().square().sum()
        outside = energy - s.double().square().cumsum(0)
        enough = (outside <= max(self.residual_tol, 1e-6) * energy).nonzero()
        rank = enough[0].item() + 1 if len(enough) else self.rank_max
        rank = max(rank, self.rank_min)
        rank = -(-rank // self.rank_multiple) * self.rank_multiple
        if self.never_grow and self.t > 0:
            rank = min(rank, max(self.rank, self.rank_min))
        return min(rank, self.rank_max, (s > 1e-6 * s[0]).sum().item())

    def new_subspace(self, H):
        Q = randomized_basis(H, sketch(self.seed, self.name, self.t, H.shape[1], self.rank_max))
        _, s, Vh = torch.linalg.svd(H @ Q, full_matrices=False)
        self.rank = self.choose_rank(H, s)
        V = Vh[: self.rank].T
        # The leading subspace in the range finder's coordinates, whatever signs or order the SVD returned.
        old, self.basis = self.basis, Q @ positive_qr(V @ V[: self.rank].T)
        if old is not None:
            rotation = old.T @ self.basis
            self.adam.M, self.adam.V = self.adam.M @ rotation, self.carry(self.adam.V, rotation)
        self.age, self.refreshes = 0, self.refreshes + 1

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        due = self.t == 0 or self.age >= self.gap or self.converged
        if due and H.any():
            self.new_subspace(H)
        R = H @ self.basis
        update = self.adam.update(R, self.basis)
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * self.scale * update)
        self.t += 1
        self.age += 1
        self.converged = R.norm().item() <= self.grad_norm_tol
