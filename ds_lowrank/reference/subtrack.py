"""SubTrack++ as arXiv 2502.01586 describes it: dense, one process.

    t = 0:        Q <- leading right singular vectors of H
    t = T, 2T..:  A <- argmin |H - A Q^T|,  gradient of |H - A Q^T|^2 in Q:  F = -2 (H - A Q^T)^T A
                  F ~ sigma u v^T,  Q_old = Q
                  Q <- Q + (cos(theta) - 1) Q v v^T - sin(theta) u v^T      theta = min(step_size * sigma, pi / 2)
                  C <- Q_old^T Q,  M and V are carried along as LDAdam does
    R <- H Q,  N <- Adam(R)
    S <- diag(|N_i| / |R_i|) (H - R Q^T)
    S <- S * zeta |S_before| / |S|                                          if |S| > zeta |S_before|
    W <- W - lr * (scale * N Q^T + S) - lr * weight_decay * W

H is G, or G^T if the rows are compressed: kept x compressed. Q is compressed x r.
"""

from __future__ import annotations

from math import cos, pi, sin

import torch

from ds_lowrank.reference.galore import compresses_columns, leading_basis
from ds_lowrank.reference.ldadam import ProjectionAwareAdamW
from ds_lowrank.reference.sketch import sketch


class DenseSubTrack:
    """SubTrack++ on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; the sketch of the first basis derives from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.SubTrack`, by the same names.
    """

    basis: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-3,
        rank: int = 128,
        update_proj_gap: int = 200,
        step_size: float = 10.0,
        projection_aware: bool = True,
        recovery_scaling: bool = True,
        norm_growth_limit: float | None = 1.01,
        projector: str = "randomized",
        scale: float = 0.25,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.scale, self.gap = weight, name, lr, scale, update_proj_gap
        self.rank, self.projector, self.step_size = min(rank, m, n), projector, step_size
        self.projection_aware, self.recovery_scaling = projection_aware, recovery_scaling
        self.limit, self.right = norm_growth_limit, compresses_columns(proj_type, m, n)
        self.weight_decay, self.seed, self.adam = weight_decay, seed, ProjectionAwareAdamW(betas, eps)
        self.t, self.previous = 0, 0.0

    def first_basis(self, G: torch.Tensor) -> torch.Tensor:
        """A basis of the first gradient's leading subspace, compressed x r."""
        W = sketch(self.seed, self.name, 0, G.shape[1 if self.right else 0], self.rank)
        return leading_basis(G, W, self.right, self.projector)

    def tracked(self, H: torch.Tensor) -> torch.Tensor:
        """The basis after a step along the geodesic against the gradient of the projection error."""
        Q = self.basis
        A = torch.linalg.lstsq(Q, H.T).solution.T
        F = -2 * (H - A @ Q.T).T @ A
        U, sigma, Vh = torch.linalg.svd(F, full_matrices=False)
        u, v, theta = U[:, :1], Vh[:1].T, min(self.step_size * sigma[0].item(), pi / 2)
        moved: torch.Tensor = Q + (cos(theta) - 1) * Q @ v @ v.T - sin(theta) * u @ v.T
        return moved

    def rest(self, H: torch.Tensor, R: torch.Tensor, N: torch.Tensor) -> torch.Tensor:
        """What the subspace leaves out of the gradient, scaled and limited: S."""
        before = R.norm(dim=1, keepdim=True)
        S = torch.where(before > 0, N.norm(dim=1, keepdim=True) / before, 0.0) * (H - R @ self.basis.T)
        size = S.norm().item()
        if self.limit is not None and self.previous > 0 and size > self.limit * self.previous:
            S = S * (self.limit * self.previous / size)
        self.previous = S.norm().item()
        return S

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n. A gradient of zeros leaves the basis where it is."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        if self.t == 0:
            self.basis = self.first_basis(G)
        elif self.t % self.gap == 0 and G.any():
            old, self.basis = self.basis, self.tracked(H)
            if self.projection_aware:
                self.adam.rotate(old.T @ self.basis)
        R = H @ self.basis
        N = self.adam.direction(R)
        update = self.scale * N @ self.basis.T
        if self.recovery_scaling:
            update = update + self.rest(H, R, N)
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * update)
        self.t += 1
