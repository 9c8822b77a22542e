"""GradNormLoRP as arXiv 2412.19616 writes it, on a full weight: dense, one process, with v and g as tensors.

The gradients are those of weight normalisation (arXiv 1602.07868, Equation 3), left to autograd. A unit of zeros has no
direction: it takes the projected step as it is, and its length from where that leads.
"""

import torch

from ds_lowrank.reference.galore import DenseGaLore
from ds_lowrank.reference.inner import make_inner


class DenseGradNormLoRP:
    """One matrix. ``step`` changes ``weight`` in place."""

    def __init__(self, weight, name="w", lr=1e-2, norm_axis="output", update_proj_gap=250, **options):
        self.weight, self.lr = weight, lr
        self.axis = 1 if norm_axis == "output" else 0
        self.decay = options.pop("weight_decay", 0.0)
        options.pop("parametrization", None)
        self.v, self.g = weight.clone(), weight.norm(dim=self.axis, keepdim=True)
        # GaLore's update of v from a rate of one and without decay: the difference it makes is -scale * N Q^T.
        self.moved = torch.zeros_like(weight)
        self.galore = DenseGaLore(self.moved, name=name, lr=1.0, update_proj_gap=update_proj_gap, **options)
        betas, eps = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
        self.adam = make_inner("adamw", betas, eps, 0.0, "subspace")

    @property
    def t(self):
        return self.galore.t

    @property
    def rank(self):
        return self.galore.rank

    def norm(self, v):
        return v.norm(dim=self.axis, keepdim=True)

    def tangent(self, G):
        """dL/dv and dL/dg from dL/dW, by autograd."""
        zero = self.norm(self.v) == 0
        v = self.v.clone().requires_grad_()
        g = self.g.clone().requires_grad_()
        W = torch.where(zero, v, g * v / self.norm(torch.where(zero, torch.ones_like(v), v)))
        return torch.autograd.grad(W, (v, g), G)

    def step(self, G, lr=None):
        lr = self.lr if lr is None else lr
        zero = self.norm(self.v) == 0
        dv, dg = self.tangent(G)
        self.moved.zero_()
        self.galore.step(dv)
        one = torch.ones(1, 1, dtype=G.dtype)
        change = self.adam.update(dg.reshape(-1, 1), one).reshape(self.g.shape)
        if lr == 0:
            return
        self.v = (1 - lr * self.decay) * self.v + lr * self.moved
        self.g = (1 - lr * self.decay) * self.g - lr * change
        self.g = torch.where(zero, self.norm(self.v), self.g)
        length = self.norm(self.v)
        self.weight.copy_(torch.where(length == 0, torch.zeros_like(self.v), self.g * self.v / length))
