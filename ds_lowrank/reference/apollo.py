"""APOLLO as its paper writes it (arXiv 2412.05270, Algorithm 1): dense, one process.

Adam on a random projection says only how long the update is: per channel, or (mini) for the whole matrix.
"""

import torch

from ds_lowrank.reference.galore import compresses_columns, sketch
from ds_lowrank.reference.inner import AdamW


class DenseApollo:
    """One matrix. ``step`` changes ``weight`` in place. ``rank`` and ``scale`` of None: 128 and 1, mini 1 and √128."""

    def __init__(
        self,
        weight,
        name="w",
        lr=1e-2,
        rank=None,
        mini=False,
        scale=None,
        update_proj_gap=200,
        norm_growth_limit=1.01,
        proj_type="std",
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        seed=0,
    ):
        m, n = weight.shape
        default_rank, default_scale = (1, 128**0.5) if mini else (128, 1.0)
        self.weight, self.name, self.lr, self.mini, self.gap = weight, name, lr, mini, update_proj_gap
        self.rank = min(default_rank if rank is None else rank, m, n)
        self.scale = default_scale if scale is None else scale
        self.limit, self.right = norm_growth_limit, compresses_columns(proj_type, m, n)
        self.weight_decay, self.seed, self.adam = weight_decay, seed, AdamW(betas, eps)
        self.t, self.previous = 0, 0.0

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        P = sketch(self.seed, self.name, self.t // self.gap, H.shape[1], self.rank).to(H.dtype) / self.rank**0.5
        R = H @ P
        over = (0, 1) if self.mini else 1
        before, after = R.norm(dim=over, keepdim=True), self.adam.direction(R).norm(dim=over, keepdim=True)
        S = torch.where(before > 0, after / before, 0.0) * H
        size = S.norm().item()
        if self.limit is not None and self.previous > 0 and size > self.limit * self.previous:
            S = S * (self.limit * self.previous / size)
        self.previous = S.norm().item()
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * self.scale * S)
        self.t += 1
