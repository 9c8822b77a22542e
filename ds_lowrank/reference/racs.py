"""RACS as arXiv 2502.07752, Algorithm 1, writes it: dense, one process.

    q' <- 1;  then ``iterations`` times:  s' <- diag(H Q' H^T) / |q'|^2,  q' <- diag(H^T S' H) / |s'|^2
    s <- beta s + (1 - beta) s',  q <- beta q + (1 - beta) q'
    H~  <- diag(s)^(-1/2) H diag(q)^(-1/2)
    eta <- gamma / max(|H~| / phi, gamma)      1 in the first step;  phi <- eta |H~|
    W <- W - lr * scale * eta * H~

The first line is Equation 16. The paper has m <= n, q along m and s along n. H is G, or G^T if the rows are compressed:
kept x compressed, so that s is along the kept dimension and q along the compressed one. A row or column that has had no
gradient yet is not moved.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns


class DenseRacs:
    """RACS on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; not used.
        lr: the learning rate of a step that is given none.
        eps: not used.

    The other arguments are the options of :class:`ds_lowrank.Racs`, by the same names.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        beta: float = 0.9,
        iterations: int = 5,
        scale: float = 0.05,
        norm_growth_limit: float | None = 1.01,
        proj_type: str = "std",
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.weight, self.lr, self.beta, self.iterations, self.scale = weight, lr, beta, iterations, scale
        self.gamma, self.weight_decay = norm_growth_limit, weight_decay
        self.right = compresses_columns(proj_type, *weight.shape)
        self.s = self.q = torch.zeros(())
        self.phi, self.t = 0.0, 0

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = (G, self.weight) if self.right else (G.T, self.weight.T)
        s, q = self.fixed_point(H)
        self.s = self.beta * self.s + (1 - self.beta) * s
        self.q = self.beta * self.q + (1 - self.beta) * q
        product = torch.outer(self.s, self.q)
        scaled = torch.where(product > 0, H / product.sqrt(), 0.0)
        norm, eta = scaled.norm().item(), 1.0
        if self.gamma is not None and self.phi > 0:
            eta = self.gamma / max(norm / self.phi, self.gamma)
        self.phi = eta * norm
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * self.scale * eta * scaled)
        self.t += 1

    def fixed_point(self, H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Equation 16: s' and q' of one gradient, nearly principal singular vectors of H * H; zeros for zeros."""
        squared = H**2
        q = H.new_ones(H.shape[1])
        s = squared @ q / q.square().sum()
        for _ in range(self.iterations - 1):
            q = self._over_squares(squared.T @ s, s)
            s = self._over_squares(squared @ q, q)
        return s, self._over_squares(squared.T @ s, s)

    @staticmethod
    def _over_squares(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        total = by.square().sum()
        return x / total if total > 0 else torch.zeros_like(x)
