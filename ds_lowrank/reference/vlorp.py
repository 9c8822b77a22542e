"""VLoRP as arXiv 2505.01744 writes it: dense, one process, the gradient literally reshaped.

With c the granularity, an m x n gradient becomes many short units of length L (n/c of a row, or m/c of a column), the
rows of a matrix Gt:

    every T steps    P <- a new N(0, 1/r), L x r
    R <- Gt P
    sgd              W <- W - lr * s unview(R P^T)
    subspace         W <- W - lr * s unview(Adam(R) P^T)
    original_space   W <- W - lr * Adam(s unview(R P^T))
    projfactor       M <- b1 M + (1 - b1) R
                     v_row, v_col <- moving averages of the row and column sums of (s unview(R P^T))^2
                     vhat <- v_row v_col^T / sum v_row
                     W <- W - lr * sqrt(1 - b2^t) / (1 - b1^t) * s unview(M P^T) / (sqrt(vhat) + eps)

s is the official code's scale, a factor on whatever is lifted.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from ds_lowrank.reference.galore import compresses_columns
from ds_lowrank.reference.inner import AdamW
from ds_lowrank.reference.sketch import sign_sketch, sketch


class DenseVLoRP:
    """VLoRP on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; projections derive from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.VLoRP`, by the same names.

    Attributes:
        length: L, the length of a unit.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank: int = 4,
        granularity: float | str = 64,
        update_scheme: str = "projfactor",
        scale: float = 1.0,
        distribution: str = "gaussian",
        update_proj_gap: int = 100,
        proj_type: str = "std",
        moment_on_resample: str = "keep",
        left_view: str = "transpose",
        eps_position: str = "outside",
        bias_correction: str = "sqrt",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap = weight, name, lr, update_proj_gap
        # A float of 1/3 means the fraction.
        self.c = Fraction(granularity).limit_denominator(10**6)
        self.right, self.left_view = compresses_columns(proj_type, m, n), left_view
        self.update_scheme, self.distribution, self.moment_on_resample = update_scheme, distribution, moment_on_resample
        self.scale = scale
        self.eps_position, self.bias_correction = eps_position, bias_correction
        self.betas, self.eps, self.weight_decay, self.seed = betas, eps, weight_decay, seed
        self.t, self.adam = 0, AdamW(betas, eps)
        self.M = self.v_row = self.v_col = torch.zeros(())
        self.M_steps = 0
        self.length = self.view(weight).shape[1]
        self.rank = min(rank, self.length)

    def view(self, G: torch.Tensor) -> torch.Tensor:
        """Gt, units x L, of an m x n matrix."""
        m, n = G.shape
        if self.right:
            return G.reshape(int(m * self.c), int(n / self.c))
        if self.left_view == "transpose":
            return G.T.reshape(int(n * self.c), int(m / self.c))
        return G.reshape(int(m / self.c), int(n * self.c)).T

    def unview(self, Gt: torch.Tensor) -> torch.Tensor:
        """The m x n matrix of which Gt is the view."""
        m, n = self.weight.shape
        if self.right:
            return Gt.reshape(m, n)
        if self.left_view == "transpose":
            return Gt.reshape(n, m).T
        return Gt.T.reshape(m, n)

    def lift(self, R: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
        """``s unview(R P^T)``, m x n."""
        return self.scale * self.unview(R @ P.T)

    def projection(self, counter: int) -> torch.Tensor:
        """P, L x r, of variance 1/r: normal, or signs."""
        draw = sketch if self.distribution == "gaussian" else sign_sketch
        P = draw(self.seed, self.name, counter, self.length, self.rank)
        scaled: torch.Tensor = P.to(self.weight.dtype) / self.rank**0.5
        return scaled

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        P = self.projection(self.t // self.gap)
        if self.t > 0 and self.t % self.gap == 0:
            C = self.projection(self.t // self.gap - 1).T @ P
            self.resample(C / (1 + (self.length + 1) / self.rank) ** 0.5)
        R = self.view(G) @ P
        if self.update_scheme == "projfactor":
            update = self.projfactor(R, P)
        elif self.update_scheme == "subspace":
            update = self.lift(self.adam.direction(R), P)
        elif self.update_scheme == "original_space":
            update = self.adam.direction(self.lift(R, P))
        else:
            update = self.lift(R, P)
        self.weight.mul_(1 - lr * self.weight_decay)
        self.weight.sub_(lr * update)
        self.t += 1

    def resample(self, C: torch.Tensor) -> None:
        """Reset the moments, or carry the first one by C, r x r, as ``moment_on_resample`` says."""
        if self.moment_on_resample == "reset":
            self.M, self.M_steps, self.adam = torch.zeros(()), 0, AdamW(self.betas, self.eps)
        elif self.moment_on_resample == "reproject" and self.update_scheme == "projfactor":
            self.M = self.M @ C
        elif self.moment_on_resample == "reproject":
            self.adam.M = self.adam.M @ C

    def projfactor(self, R: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
        """Update the first moment and the factors of the second; the direction, m x n."""
        beta1, beta2 = self.betas
        self.M_steps += 1
        self.M = beta1 * self.M + (1 - beta1) * R
        squared = self.lift(R, P) ** 2
        self.v_row = beta2 * self.v_row + (1 - beta2) * squared.sum(1)
        self.v_col = beta2 * self.v_col + (1 - beta2) * squared.sum(0)
        # v_row v_col^T / sum(v_row), divided first: a product of two squares can leave the range of fp32.
        vhat = torch.outer(self.v_row / self.v_row.sum(), self.v_col)
        root = (vhat + self.eps).sqrt() if self.eps_position == "inside" else vhat.sqrt() + self.eps
        correction2 = 1 - beta2 ** (self.t + 1)
        if self.bias_correction == "sqrt":
            correction2 = correction2**0.5
        return correction2 / (1 - beta1**self.M_steps) * self.lift(self.M, P) / root
