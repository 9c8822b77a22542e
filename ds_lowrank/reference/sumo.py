"""SUMO as arXiv 2505.24749, Algorithm 1, writes it: dense, one process.

    after K steps, or if the last |R| <= tol * |R| of the subspace's first step:
        Q <- leading subspace of H,  M <- M C  with C = Q_old^T Q
    R <- H Q
    M <- mu M + R
    N <- U V^T  with M = U S V^T
    N <- N * gamma |N_before| / |N|      if |N| > gamma |N_before|
    W <- W - lr * scale * (sqrt(max(m, n)) N Q^T + complement (H - R Q^T))

H is G, or G^T if the rows are compressed: kept x compressed. Q is compressed x r.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns, randomized_basis
from ds_lowrank.reference.sketch import sketch


def polar_factor(M: torch.Tensor) -> torch.Tensor:
    """``U V^T`` of the singular value decomposition, in fp64; singular values that are rounding count as zero."""
    U, s, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    found: torch.Tensor = (U * (s > 1e-6 * s[0])) @ Vh
    return found.to(M.dtype)


class DenseSumo:
    """SUMO on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; sketches derive from it.
        lr: the learning rate of a step that is given none.
        eps: not used.

    The other arguments are the options of :class:`ds_lowrank.Sumo`, by the same names.
    """

    basis: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank: int = 128,
        momentum: float = 0.95,
        update_proj_gap: int = 200,
        grad_norm_tol: float = 0.0,
        norm_growth_limit: float | None = 1.1,
        complement: float = 1.0,
        shape_scaling: bool = True,
        scale: float = 1.0,
        proj_type: str = "reverse_std",
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap, self.scale = weight, name, lr, update_proj_gap, scale
        self.rank, self.mu, self.tol, self.limit = min(rank, m, n), momentum, grad_norm_tol, norm_growth_limit
        self.complement, self.shape_factor = complement, max(m, n) ** 0.5 if shape_scaling else 1.0
        self.right, self.weight_decay, self.seed = compresses_columns(proj_type, m, n), weight_decay, seed
        self.M = torch.zeros(())
        self.t, self.age, self.used_up, self.previous, self.first = 0, 0, True, 0.0, 0.0

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        refresh = self.used_up and bool(H.any())
        if refresh:
            new = randomized_basis(H, sketch(self.seed, self.name, self.t, H.shape[1], self.rank))
            self.M = self.M @ (self.basis.T @ new) if self.t > 0 else self.M
            self.basis, self.age = new, 0
        R = H @ self.basis
        self.M = self.mu * self.M + R
        N = polar_factor(self.M)
        size = N.norm().item()
        if self.limit is not None and self.previous > 0 and size > self.limit * self.previous:
            N = N * (self.limit * self.previous / size)
        self.previous = N.norm().item()
        W.mul_(1 - lr * self.weight_decay)
        rest = H - R @ self.basis.T
        W.sub_(lr * self.scale * (self.shape_factor * N @ self.basis.T + self.complement * rest))
        self.t += 1
        self.age += 1
        norm = R.norm().item()
        self.first = norm if refresh else self.first
        is_small = self.tol > 0 and not refresh and norm <= self.tol * self.first
        self.used_up = self.age >= self.gap or is_small
