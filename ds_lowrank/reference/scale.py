"""SCALE as arXiv 2506.16659, Algorithm 1, writes it: dense, one process.

    M <- momentum M + (1 - momentum) G         momentum 0: M = G
    C(M)_i <- M_i / rms(M_i)                   for each output unit i; ``length``: M_i / |M_i|
    W <- W - lr * scale * C(M)

The paper's weights are input x output, so that it divides columns; ours are output x input, and rows are divided. A
divisor is at least ``eps``.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.galore import compresses_columns


class DenseScale:
    """SCALE on one matrix.

    Args:
        weight: m x n, changed in place.
        name: of the matrix; not used.
        lr: the learning rate of a step that is given none.

    The other arguments are the options of :class:`ds_lowrank.Scale`, by the same names.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        name: str = "w",
        lr: float = 1e-2,
        momentum: float = 0.0,
        normalization: str = "rms",
        scale: float = 1.0,
        proj_type: str = "right",
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.weight, self.lr, self.momentum, self.scale, self.eps = weight, lr, momentum, scale, eps
        self.by_rows = compresses_columns(proj_type, *weight.shape)
        self.rms, self.weight_decay = normalization == "rms", weight_decay
        self.M, self.t = torch.zeros_like(weight), 0

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n."""
        lr = self.lr if lr is None else lr
        self.M = self.momentum * self.M + (1 - self.momentum) * G
        dim = 1 if self.by_rows else 0
        size = self.M.norm(dim=dim, keepdim=True)
        if self.rms:
            size = size / self.M.shape[dim] ** 0.5
        self.weight.mul_(1 - lr * self.weight_decay)
        self.weight.sub_(lr * self.scale * self.M / size.clamp_min(self.eps))
        self.t += 1
