"""LORENZA and AdaZo-SAM as arXiv 2502.19571 writes them: dense, one process.

    every T steps    Q <- range finder of H,  F <- QR of H Q,  M, V <- rotated into Q
                     (or F S V^T = SVD of H Q,  Q <- Q V)
    Pi_j = F diag(u) Q^T, or U Q^T, with u, U of N(0, 1)       (AdaZo-SAM: N(0, 1), m x n)
    c_j  = (L(W + mu Pi_j) - L(W - mu Pi_j)) / (2 mu)          for q probes
    G_pert = 1/q sum_j c_j Pi_j
    G    = grad L(W + rho G_pert / |G_pert|)
    R <- H Q
    W <- W - lr * scale * Adam(R) Q^T

H is G, or G^T if the rows are compressed: kept x compressed. Q is compressed x r, and F, the paper's R_t transposed,
kept x r with orthonormal columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ds_lowrank.reference.galore import compresses_columns, positive_qr, randomized_basis
from ds_lowrank.reference.inner import AdamW
from ds_lowrank.reference.sketch import sketch


class DenseLorenza:
    """LORENZA on one matrix, or AdaZo-SAM if the rank is None.

    Args:
        weight: m x n, changed in place by ``step``.
        name: of the matrix; sketches and probes derive from it.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.Lorenza`, by the same names; those of the perturbation,
    which spans all matrices, are ignored here and passed to :func:`climb`.
    """

    Q: torch.Tensor
    F: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        rank: int | None = 4,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        probe_form: str | None = None,
        right_factor: str = "qr",
        moment_on_refresh: str = "rotate",
        power_steps: int = 1,
        orthogonal_component: bool = False,
        orthogonal_scale: float | str = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        **_: object,
    ) -> None:
        m, n = weight.shape
        self.weight, self.name, self.lr, self.gap, self.scale = weight, name, lr, update_proj_gap, scale
        self.rank = None if rank is None else min(rank, m, n)
        self.diagonal, self.in_pairs = probe_form != "gaussian", right_factor == "svd"
        self.power_steps = power_steps
        self.moment_on_refresh, self.weight_decay, self.seed = moment_on_refresh, weight_decay, seed
        self.orthogonal_scale = orthogonal_scale if orthogonal_component else None
        self.right = compresses_columns(proj_type, m, n)
        self.betas, self.eps, self.adam, self.t = betas, eps, AdamW(betas, eps), 0

    def turned(self, matrix: torch.Tensor) -> torch.Tensor:
        """An m x n matrix as kept x compressed, or the reverse."""
        return matrix if self.right else matrix.T

    def direction(self, counter: str) -> torch.Tensor:
        """Pi for one probe, m x n; zero before there is a subspace."""
        if self.rank is None:
            return sketch(self.seed, self.name, counter, *self.weight.shape)
        if self.t == 0:
            return torch.zeros_like(self.weight)
        if self.diagonal:
            u = sketch(self.seed, self.name, counter, 1, self.rank).squeeze(0)
            return self.turned(self.F @ torch.diag(u) @ self.Q.T)
        return self.turned(sketch(self.seed, self.name, counter, self.F.shape[0], self.rank) @ self.Q.T)

    def refresh(self, H: torch.Tensor, rank: int) -> None:
        """Find Q and F anew, and carry the moments into Q."""
        W = sketch(self.seed, self.name, self.t, H.shape[1 if self.power_steps else 0], rank)
        new = randomized_basis(H, W, self.power_steps)
        F = positive_qr(H @ new)
        if self.in_pairs:
            # In fp64: rounding turns vectors whose singular values are close.
            F, _, Vh = torch.linalg.svd((H @ new).double(), full_matrices=False)
            # The sign of a pair is free: the largest entry of the right vector is positive.
            signs = torch.stack([row[row.abs().argmax()].sign() for row in Vh])
            F, new = (F * signs).to(H.dtype), new @ (Vh.T * signs).to(H.dtype)
        if self.moment_on_refresh == "rotate" and self.t > 0:
            self.adam.rotate(self.Q.T @ new)
        if self.moment_on_refresh == "reset":
            self.adam = AdamW(self.betas, self.eps)
        self.Q, self.F = new, F

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        H, W = self.turned(G), self.turned(self.weight)
        if self.rank is None:
            update = self.adam.direction(H)
        else:
            if self.t % self.gap == 0:
                self.refresh(H, self.rank)
            R = H @ self.Q
            N = self.adam.direction(R)
            update = self.scale * N @ self.Q.T
            if self.orthogonal_scale is not None:
                before, after = R.norm(dim=1, keepdim=True), N.norm(dim=1, keepdim=True)
                ratio = torch.where(before > 0, after / before, 0.0)
                s = ratio if self.orthogonal_scale == "norm_ratio" else float(self.orthogonal_scale)
                update = update + s * (H - R @ self.Q.T)
        W.mul_(1 - lr * self.weight_decay)
        W.sub_(lr * update)
        self.t += 1


def climb(
    rules: Sequence[DenseLorenza],
    loss: Callable[[], torch.Tensor],
    step: int,
    micro_batch: int = 0,
    probes: int = 1,
    probe_radius: float = 1e-3,
    perturbation_radius: float = 0.05,
    two_sided: bool = True,
    norm: str = "global",
    **_: object,
) -> list[float]:
    """Move the weights of all matrices to where the loss is higher.

    The perturbation is simultaneous: one c_j for all matrices. Nothing moves before there is a subspace, or if the
    radius is zero.

    Args:
        rules: the matrices.
        loss: computes the loss at the weights as they are, a scalar.
        step: the number of steps so far.
        micro_batch: the number of the micro-batch within the step.
        probes: q.
        probe_radius: mu.
        perturbation_radius: rho.
        two_sided: whether a probe looks at both sides of the weights.
        norm: over what ``|G_pert|`` is taken, ``global`` or ``per_matrix``.

    Returns:
        The slopes c_j.
    """
    if perturbation_radius == 0 or not any(rule.rank is None or rule.t > 0 for rule in rules):
        return []
    start = [rule.weight.clone() for rule in rules]

    def loss_at(distance: float, directions: Sequence[torch.Tensor]) -> float:
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
