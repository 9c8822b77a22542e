"""LORENZA as arXiv 2502.19571 writes it: dense, one process, independent of the package it judges.

One orientation serves both sides: H is G (right) or G^T (left), kept x compressed; Q is compressed x r, F (the paper's
R_t, transposed) kept x r with orthonormal columns.
"""

import torch

from ds_lowrank.reference.galore import compresses_columns, positive_qr, randomized_basis, sketch
from ds_lowrank.reference.inner import make_inner


class DenseLorenza:
    """One matrix. ``step`` changes ``weight`` in place; ``direction`` is a perturbation of it."""

    def __init__(
        self,
        weight,
        name="w",
        lr=1e-2,
        rank=4,
        update_proj_gap=200,
        scale=1.0,
        proj_type="std",
        probe_form=None,
        moment_on_refresh="rotate",
        orthogonal_component=False,
        orthogonal_scale=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        seed=0,
        **climb,
    ):
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap, self.scale, self.seed = (
            weight,
            name,
            lr,
            update_proj_gap,
            scale,
            seed,
        )
        self.rank = None if rank is None else min(rank, m, n)
        self.form = probe_form or ("gaussian" if rank is None else "diagonal")
        self.moment_on_refresh, self.weight_decay = moment_on_refresh, weight_decay
        self.orthogonal_scale = orthogonal_scale if orthogonal_component else None
        self.right = compresses_columns(proj_type, m, n)
        self.new_inner = lambda: make_inner("adamw", betas, eps, 0.0, "subspace")
        self.inner, self.t, self.Q = self.new_inner(), 0, None

    def turned(self, matrix):
        return matrix if self.right else matrix.T

    def direction(self, counter):
        """The paper's Pi for one probe, m x n; zero before there is a subspace."""
        if self.rank is None:
            return sketch(self.seed, self.name, counter, *self.weight.shape)
        if self.Q is None:
            return torch.zeros_like(self.weight)
        if self.form == "diagonal":
            u = sketch(self.seed, self.name, counter, 1, self.rank).squeeze(0)
            return self.turned(self.F @ torch.diag(u) @ self.Q.T)
        return self.turned(sketch(self.seed, self.name, counter, self.F.shape[0], self.rank) @ self.Q.T)

    def refresh(self, H):
        old, self.Q = self.Q, randomized_basis(H, sketch(self.seed, self.name, self.t, H.shape[1], self.rank))
        self.F = positive_qr(H @ self.Q)
        if self.moment_on_refresh == "rotate" and old is not None:
            self.inner.rotate(old.T @ self.Q)
        if self.moment_on_refresh == "reset":
            self.inner = self.new_inner()

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        H, W = self.turned(G), self.turned(self.weight)
        if self.rank is None:
            update = self.inner.direction(H)
        else:
            if self.t % self.gap == 0:
                self.refresh(H)
            R = H @ self.Q
            N = self.inner.direction(R)
            update = self.scale * N @ self.Q.T
            if self.orthogonal_scale is not None:
                s = self.orthogonal_scale
                if s == "norm_ratio":
                    s = N.norm(dim=1, keepdim=True) / R.norm(dim=1, keepdim=True)
                update = update + s * (H - R @ self.Q.T)
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * update)
        self.t += 1


def climb(
    rules,
    loss,
    step,
    micro_batch=0,
    probes=1,
    probe_radius=1e-3,
    perturbation_radius=0.05,
    two_sided=True,
    norm="global",
    **_,
):
    """Move the weights of all rules to where the loss is higher; returns the slopes c_j.

    Simultaneous perturbation: one c_j for all matrices. Nothing moves where there is no subspace yet, or no radius.
    """
    if perturbation_radius == 0 or not any(rule.rank is None or rule.Q is not None for rule in rules):
        return []
    start = [rule.weight.clone() for rule in rules]

    def loss_at(distance, directions):
        for rule, weight, direction in zip(rules, start, directions, strict=True):
            rule.weight.copy_(weight + distance * direction)
        return loss().item()

    slopes, total = [], [torch.zeros_like(weight) for weight in start]
    for probe in range(probes):
        directions = [rule.direction(f"{step} probe {micro_batch}.{probe}") for rule in rules]
        ahead, mu = loss_at(probe_radius, directions), probe_radius
        c = (ahead - loss_at(-mu, directions)) / (2 * mu) if two_sided else (ahead - loss_at(0.0, directions)) / mu
        slopes.append(c)
        total = [sum_ + c * direction / probes for sum_, direction in zip(total, directions, strict=True)]
    lengths = torch.stack([direction.norm() for direction in total])
    if norm == "global":
        lengths = lengths.norm().expand_as(lengths)
    for rule, weight, direction, length in zip(rules, start, total, lengths, strict=True):
        rule.weight.copy_(weight + (perturbation_radius * direction / length if length > 0 else 0.0))
    return slopes
