"""AdaRankGrad from the building blocks of arXiv 2410.17881: dense, one process.

    if |R| of the last step <= grad_norm_tol, or <= grad_norm_ratio_tol |R in the first step with Q|, or after T steps:
        Q_0 <- range finder of H with rank_max columns
        r   <- the smallest rank with |H|^2 - s_1^2 - ... - s_r^2 <= residual_tol |H|^2,  s = singular values of H Q_0
        Q   <- the leading r directions of H inside Q_0
        M, V <- M C, V C^2       with C = Q_old^T Q (C^2 element by element, or another rule for V)
    R <- H Q
    W <- W - lr * scale * Adam(R) Q^T

H is G, or G^T if the rows are compressed: kept x compressed. Q is compressed x r.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns, positive_qr, randomized_basis
from ds_lowrank.reference.inner import AdamW
from ds_lowrank.reference.sketch import sketch


def carry(V: torch.Tensor, C: torch.Tensor, rule: str) -> torch.Tensor:
    """The second moment, kept x r, in another basis; C is r x r_new."""
    match rule:
        case "abs":
            return (V @ C).abs()
        case "clamp":
            return (V @ C).clamp(min=0)
    return V @ C**2


class DenseAdaRankGrad:
    """AdaRankGrad on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; sketches derive from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.AdaRankGrad`, by the same names.

    Attributes:
        rank: of the current subspace.
        age: the steps taken in the current subspace.
        refreshes: the subspaces so far.
        converged: whether the last projected gradient was small.
    """

    basis: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank_max: int = 128,
        rank_min: int = 1,
        residual_tol: float = 0.2,
        rank_multiple: int = 1,
        never_grow: bool = False,
        grad_norm_ratio_tol: float = 0.25,
        grad_norm_tol: float = 1e-4,
        update_proj_gap: int = 200,
        second_moment: str = "squared",
        power_steps: int = 1,
        scale: float = 0.25,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap, self.scale = weight, name, lr, update_proj_gap, scale
        self.rank_max, self.rank_min, self.rank_multiple = min(rank_max, m, n), rank_min, rank_multiple
        self.residual_tol, self.never_grow = residual_tol, never_grow
        self.grad_norm_ratio_tol, self.grad_norm_tol, self.first_norm = grad_norm_ratio_tol, grad_norm_tol, 0.0
        self.power_steps = power_steps
        self.second_moment, self.right = second_moment, compresses_columns(proj_type, m, n)
        self.weight_decay, self.seed, self.adam = weight_decay, seed, AdamW(betas, eps)
        self.rank, self.t, self.age, self.converged, self.refreshes = 0, 0, 0, False, 0

    def choose_rank(self, H: torch.Tensor, s: torch.Tensor) -> int:
        """The rank of the new subspace, from the singular values s of ``H Q_0``, largest first."""
        energy = H.double().square().sum()
        outside = energy - s.double().square().cumsum(0)
        enough = (outside <= max(self.residual_tol, 1e-6) * energy).nonzero()
        rank = int(enough[0]) + 1 if len(enough) else self.rank_max
        rank = max(rank, self.rank_min)
        rank = -(-rank // self.rank_multiple) * self.rank_multiple
        if self.never_grow and self.t > 0:
            rank = min(rank, max(self.rank, self.rank_min))
        return min(rank, self.rank_max, int((s > 1e-6 * s[0]).sum()))

    def new_subspace(self, H: torch.Tensor) -> None:
        """Choose rank and basis anew, and carry the moments into it."""
        W = sketch(self.seed, self.name, self.t, H.shape[1 if self.power_steps else 0], self.rank_max)
        Q = randomized_basis(H, W, self.power_steps)
        _, s, Vh = torch.linalg.svd(H @ Q, full_matrices=False)
        self.rank = self.choose_rank(H, s)
        V = Vh[: self.rank].T
        # The leading subspace in the range finder's coordinates, whatever signs or order the SVD returned.
        new = Q @ positive_qr(V @ V[: self.rank].T)
        if self.t > 0:
            C = self.basis.T @ new
            self.adam.M, self.adam.V = self.adam.M @ C, carry(self.adam.V, C, self.second_moment)
        self.basis, self.age, self.refreshes = new, 0, self.refreshes + 1

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
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
        norm = R.norm().item()
        self.first_norm = norm if self.age == 1 else self.first_norm
        self.converged = norm <= max(self.grad_norm_tol, self.grad_norm_ratio_tol * self.first_norm)
