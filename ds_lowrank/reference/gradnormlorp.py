"""GradNormLoRP as arXiv 2412.19616 writes it, on a full weight: dense, one process, v and g as tensors.

    W = g v / |v|                         for each output unit (a row), or each input unit
    dv, dg <- dL/dv, dL/dg                the gradients of weight normalization (arXiv 1602.07868, Equation 3)
    v <- v - lr * scale * N Q^T           GaLore's step on dv
    g <- g - lr * Adam(dg)

The gradients are left to autograd. A unit of zeros has no direction: it takes the projected step as it is, and its
magnitude is the length that this gives it.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_lowrank.reference.galore import DenseGaLore
from ds_lowrank.reference.inner import make_inner


class DenseGradNormLoRP:
    """GradNormLoRP on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; sketches derive from it.
        lr: the learning rate of a step that is given none.
        norm_axis: what has a magnitude, each ``output`` unit or each ``input`` unit.
        update_proj_gap: steps that a basis lasts.
        weight_decay: decoupled, on v and g.
        weight_decay_order: whether they decay ``before`` or ``after`` the update.
        parametrization: ignored; this is ``full``.
        options: those of :class:`DenseGaLore`.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        norm_axis: str = "output",
        update_proj_gap: int = 250,
        weight_decay: float = 0.0,
        weight_decay_order: str = "before",
        parametrization: str = "full",
        **options: Any,
    ) -> None:
        self.weight, self.lr, self.weight_decay = weight, lr, weight_decay
        self.axis = 1 if norm_axis == "output" else 0
        self.v, self.g = weight.clone(), weight.norm(dim=self.axis, keepdim=True)
        # GaLore's step from zero at a rate of one and without decay: -scale * N Q^T.
        self.moved = torch.zeros_like(weight)
        self.galore = DenseGaLore(self.moved, name=name, lr=1.0, update_proj_gap=update_proj_gap, **options)
        betas, eps = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
        self.adam = make_inner("adamw", betas, eps, eps_root=options.get("eps_root", "corrected"))
        self.decays_after = weight_decay_order == "after"

    @property
    def t(self) -> int:
        """The number of steps so far."""
        return self.galore.t

    @property
    def rank(self) -> int:
        """The columns of the basis."""
        return self.galore.rank

    def norm(self, v: torch.Tensor) -> torch.Tensor:
        """The length of each unit, m x 1 or 1 x n."""
        length: torch.Tensor = v.norm(dim=self.axis, keepdim=True)
        return length

    def tangent(self, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``dL/dv``, m x n, and ``dL/dg``, m x 1 or 1 x n, from ``dL/dW``, by autograd."""
        zero = self.norm(self.v) == 0
        v = self.v.clone().requires_grad_()
        g = self.g.clone().requires_grad_()
        W = torch.where(zero, v, g * v / self.norm(torch.where(zero, torch.ones_like(v), v)))
        dv, dg = torch.autograd.grad(W, (v, g), G)
        return dv, dg

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        zero = self.norm(self.v) == 0
        dv, dg = self.tangent(G)
        self.moved.zero_()
        self.galore.step(dv)
        change = self.adam.direction(dg.reshape(-1, 1)).reshape(self.g.shape)
        if lr == 0:
            return
        kept = 1 - lr * self.weight_decay
        before, after = (1.0, kept) if self.decays_after else (kept, 1.0)
        self.v = (before * self.v + lr * self.moved) * after
        self.g = (before * self.g - lr * change) * after
        self.g = torch.where(zero, self.norm(self.v), self.g)
        length = self.norm(self.v)
        self.weight.copy_(torch.where(length == 0, torch.zeros_like(self.v), self.g * self.v / length))
