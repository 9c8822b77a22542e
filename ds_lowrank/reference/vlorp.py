"""VLoRP as its paper writes it (arXiv 2505.01744): the gradient is literally reshaped; dense, one process.

With c the granularity, an m x n gradient becomes many short units of length L (n/c of a row, or m/c of a column), the
rows of a matrix Gt; R = Gt P with P, L x r, of variance 1/r.
"""

from fractions import Fraction

import torch

from ds_lowrank.reference.galore import compresses_columns, sketch, sketch_generator
from ds_lowrank.reference.inner import AdamW


class DenseVLoRP:
    """One matrix. ``step`` changes ``weight`` in place."""

    def __init__(
        self,
        weight,
        name="w",
        lr=1e-2,
        rank=4,
        granularity=64,
        update_scheme="projfactor",
        distribution="gaussian",
        update_proj_gap=100,
        proj_type="std",
        moment_on_resample="keep",
        left_view="transpose",
        eps_position="outside",
        bias_correction="sqrt",
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.0,
        seed=0,
    ):
        m, n = weight.shape
        if update_scheme == "original_space" and moment_on_resample != "keep":
            raise ValueError("original_space has no moment in the subspace: use moment_on_resample='keep'")
        self.weight, self.name, self.lr, self.gap = weight, name, lr, update_proj_gap
        # A float of 1/3 means the fraction.
        self.c = Fraction(granularity).limit_denominator(10**6)
        self.right, self.left_view = compresses_columns(proj_type, m, n), left_view
        self.update_scheme, self.distribution, self.moment_on_resample = update_scheme, distribution, moment_on_resample
        self.eps_position, self.bias_correction = eps_position, bias_correction
        self.betas, self.eps, self.weight_decay, self.seed = betas, eps, weight_decay, seed
        self.t, self.adam = 0, AdamW(betas, eps)
        self.M, self.M_steps, self.v_row, self.v_col = 0.0, 0, 0.0, 0.0
        self.length = self.view(weight).shape[1]
        self.rank = min(rank, self.length)

    def view(self, G):
        """Gt: one unit a row."""
        m, n = G.shape
        if self.right:
            return G.reshape(int(m * self.c), int(n / self.c))
        if self.left_view == "transpose":
            return G.T.reshape(int(n * self.c), int(m / self.c))
        return G.reshape(int(m / self.c), int(n * self.c)).T

    def unview(self, Gt):
        m, n = self.weight.shape
        if self.right:
            return Gt.reshape(m, n)
        if self.left_view == "transpose":
            return Gt.reshape(n, m).T
        return Gt.T.reshape(m, n)

    def projection(self, counter):
        if self.distribution == "gaussian":
            P = sketch(self.seed, self.name, counter, self.length, self.rank)
        else:
            generator = sketch_generator(self.seed, self.name, counter)
            P = torch.randint(0, 2, (self.length, self.rank), generator=generator) * 2 - 1
        return P.to(self.weight.dtype) / self.rank**0.5

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        P = self.projection(self.t // self.gap)
        if self.t > 0 and self.t % self.gap == 0:
            C = self.projection(self.t // self.gap - 1).T @ P
            self.resample(C / (1 + (self.length + 1) / self.rank) ** 0.5)
        R = self.view(G) @ P
        if self.update_scheme == "projfactor":
            update = self.projfactor(R, P)
        elif self.update_scheme == "subspace":
            update = self.unview(self.adam.direction(R) @ P.T)
        else:
            update = self.adam.direction(self.unview(R @ P.T))
        self.weight.mul_(1 - lr * self.weight_decay)
        self.weight.sub_(lr * update)
        self.t += 1

    def resample(self, C):
        if self.moment_on_resample == "reset":
            self.M, self.M_steps, self.adam = 0.0, 0, AdamW(self.betas, self.eps)
        elif self.moment_on_resample == "reproject" and self.update_scheme == "projfactor":
            self.M = self.M @ C
        elif self.moment_on_resample == "reproject":
            self.adam.M = self.adam.M @ C

    def projfactor(self, R, P):
        beta1, beta2 = self.betas
        self.M_steps += 1
        self.M = beta1 * self.M + (1 - beta1) * R
        squared = self.unview(R @ P.T) ** 2
        self.v_row = beta2 * self.v_row + (1 - beta2) * squared.sum(1)
        self.v_col = beta2 * self.v_col + (1 - beta2) * squared.sum(0)
        # v_row v_col^T / sum(v_row), divided first: a product of two squares can leave the range of fp32.
        vhat = torch.outer(self.v_row / self.v_row.sum(), self.v_col)
        root = (vhat + self.eps).sqrt() if self.eps_position == "inside" else vhat.sqrt() + self.eps
        correction2 = 1 - beta2 ** (self.t + 1)
        if self.bias_correction == "sqrt":
            correction2 = correction2**0.5
        return correction2 / (1 - beta1**self.M_steps) * self.unview(self.M @ P.T) / root
