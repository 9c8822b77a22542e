"""APOLLO and APOLLO-Mini as arXiv 2412.05270, Algorithm 1, writes them: dense, one process.

    every T steps    P <- a new N(0, 1/r), compressed x r
    R <- H P
    N <- Adam(R)
    s_i <- |N_i| / |R_i|                 for each row i; Mini: r = 1 and one s = |N| / |R|
    S <- diag(s) H
    S <- S * gamma |S_before| / |S|      if |S| > gamma |S_before|
    W <- W - lr * scale * S

H is G, or G^T if the rows are compressed: kept x compressed.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns
from ds_lowrank.reference.inner import AdamW
from ds_lowrank.reference.sketch import sketch


class DenseApollo:
    """APOLLO or APOLLO-Mini on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; projections derive from it.
        lr: the learning rate of a step that is given none.
        rank: None for 128, or 1 with ``mini``.
        scale: None for 1, or ``sqrt(128)`` with ``mini``.

    The other arguments are the options of :class:`ds_lowrank.Apollo`, by the same names.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank: int | None = None,
        mini: bool = False,
        scale: float | None = None,
        update_proj_gap: int = 200,
        norm_growth_limit: float | None = 1.01,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_root: str = "corrected",
        weight_decay_order: str = "before",
        ratio_moments: str = "corrected",
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        default_rank, default_scale = (1, 128**0.5) if mini else (128, 1.0)
        self.weight, self.name, self.lr, self.mini, self.gap = weight, name, lr, mini, update_proj_gap
        self.rank = min(default_rank if rank is None else rank, m, n)
        self.scale = default_scale if scale is None else scale
        self.limit, self.right = norm_growth_limit, compresses_columns(proj_type, m, n)
        self.weight_decay, self.seed, self.adam = weight_decay, seed, AdamW(betas, eps, eps_root)
        self.is_uncorrected, self.decays_after = ratio_moments == "uncorrected", weight_decay_order == "after"
        self.t, self.previous = 0, 0.0

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        P = sketch(self.seed, self.name, self.t // self.gap, H.shape[1], self.rank).to(H.dtype) / self.rank**0.5
        R = H @ P
        over = (0, 1) if self.mini else (1,)
        N = self.adam.direction(R)
        correction = self.adam.correction if self.is_uncorrected else 1.0
        before, after = R.norm(dim=over, keepdim=True), (N / correction).norm(dim=over, keepdim=True)
        S = torch.where(before > 0, after / before, 0.0) * H
        size = S.norm().item()
        if self.limit is not None and self.previous > 0 and size > self.limit * self.previous:
            S = S * (self.limit * self.previous / size)
        self.previous = S.norm().item()
        kept = 1 - lr * self.weight_decay
        W.mul_(kept)
        W.sub_(lr * self.scale * correction * (kept if self.decays_after else 1) * S)
        self.t += 1
