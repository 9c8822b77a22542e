"""What the published codes of VLoRP and of Online Subspace Descent do to one matrix, in the notation of the papers.

Neither is a package. These classes were written from a description of the codes: they share with ``ds_lowrank`` the
definition of its random numbers and nothing else.
"""

from __future__ import annotations

import torch

from ds_lowrank.reference.sketch import sign_sketch, sketch


class OfficialProjFactor:
    """VLoRP with ProjFactor on an n x m matrix, by a random matrix of unit variance; 1/r is in the lift.

    rows >= columns    Gt = view(G, nc x m/c),  P is r x m/c:   X <- Gt P^T,   back(X) = scale X P / r
    rows <  columns    Gt = view(G, n/c x mc),  P is n/c x r:   X <- P^T Gt,   back(X) = scale P X / r

    M <- b1 M + (1 - b1) X;  v_row, v_col <- averages of the row and column sums of back(X)^2
    W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) back(M) / (sqrt(v_row v_col / sum v_row) + eps);  W <- W - lr decay W
    """

    def __init__(self, weight, rank, factor, update_proj_gap, scale, dist, eps, decay=0.0, betas=(0.9, 0.999)):
        self.W, self.r, self.c, self.T = weight, rank, factor, update_proj_gap
        self.scale, self.eps, self.decay, self.betas, self.t = scale, eps, decay, betas, 0
        self.draw = {"normal": sketch, "rademacher": sign_sketch}[dist]
        self.M = self.v_row = self.v_col = 0

    def step(self, G, lr):
        """One step on the gradient G, n x m."""
        (n, m), c, (b1, b2) = self.W.shape, self.c, self.betas
        right = n >= m
        view = (int(n * c), int(m / c)) if right else (int(n / c), int(m * c))
        P = self.draw(0, "w", self.t // self.T, view[1] if right else view[0], self.r)

        def back(X):
            lifted = X @ P.T if right else P @ X
            return self.scale * lifted.reshape(n, m) / self.r

        X = G.reshape(view) @ P if right else P.T @ G.reshape(view)
        self.t += 1
        self.M = b1 * self.M + (1 - b1) * X
        squares = back(X) ** 2
        self.v_row = b2 * self.v_row + (1 - b2) * squares.sum(1, keepdim=True)
        self.v_col = b2 * self.v_col + (1 - b2) * squares.sum(0, keepdim=True)
        root = (self.v_row @ self.v_col / self.v_row.sum()).sqrt()
        step_size = lr * (1 - b2**self.t) ** 0.5 / (1 - b1**self.t)
        self.W -= step_size * back(self.M) / (root + self.eps)
        self.W -= lr * self.decay * self.W


class OfficialOnlineSubspaceDescent:
    """Online Subspace Descent on a matrix: P is stored r x columns if rows >= columns, else rows x r.

    P <- singular vectors of the first gradient; afterwards, with Gt = G / |G|_F, at the rate lr_t / (lr_0 gap):
    dP = d|Gt P^T P - Gt|^2 / dP, or of |P P^T Gt - Gt|^2, without the paper's lambda, by torch's AdamW or SGD, or by
    Lion. W takes its step with the old P.

    adam    M, V of R = G P^T (P^T G);  W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) scale back(M / (sqrt(V) + eps))
    lion    W <- W - lr sign(back(b1 M + (1 - b1) R));  M <- b2 M + (1 - b2) R
    """

    def __init__(self, weight, lr, rank, scale, update_proj_gap, rule, basis_rule, eps, betas, decay=0.01):
        self.W, self.lr0, self.r, self.scale, self.gap = weight, lr, rank, scale, update_proj_gap
        self.rule, self.basis_rule, self.eps, self.betas, self.decay = rule, basis_rule, eps, betas, decay
        self.right, self.t = weight.shape[0] >= weight.shape[1], 0
        self.M = self.V = self.lion_P = 0

    def first(self, G):
        """P and its optimizer."""
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        self.P = torch.nn.Parameter(Vh[: self.r].clone() if self.right else U[:, : self.r].clone())
        settings = {"lr": 1 / self.gap, "weight_decay": self.decay}
        if self.basis_rule == "adam":
            self.optimizer = torch.optim.AdamW([self.P], betas=self.betas, eps=self.eps, **settings)
        elif self.basis_rule == "sgd":
            self.optimizer = torch.optim.SGD([self.P], lr=1 / self.gap)

    def step(self, G, lr):
        """One step on the gradient G at the scheduled rate."""
        b1, b2 = self.betas
        if self.t == 0:
            self.first(G)
        else:
            with torch.enable_grad():
                Gt, P = G / G.norm(), self.P
                rebuilt = Gt @ P.T @ P if self.right else P @ P.T @ Gt
                (self.P.grad,) = torch.autograd.grad((rebuilt - Gt).square().sum(), P)
        P = self.P.detach().clone()
        R = G @ P.T if self.right else P.T @ G
        self.t += 1
        if self.rule == "lion":
            N = b1 * self.M + (1 - b1) * R
            self.M = b2 * self.M + (1 - b2) * R
            self.W -= lr * (N @ P if self.right else P @ N).sign()
        else:
            self.M = b1 * self.M + (1 - b1) * R
            self.V = b2 * self.V + (1 - b2) * R**2
            N = self.M / (self.V.sqrt() + self.eps)
            step_size = lr * (1 - b2**self.t) ** 0.5 / (1 - b1**self.t)
            self.W -= step_size * self.scale * (N @ P if self.right else P @ N)
        if self.P.grad is not None:
            self.step_basis(lr / self.lr0 / self.gap)

    def step_basis(self, rate):
        """One step of P."""
        if self.basis_rule != "lion":
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            return
        b1, b2 = self.betas
        g = self.P.grad
        direction = (b1 * self.lion_P + (1 - b1) * g).sign()
        self.lion_P = b2 * self.lion_P + (1 - b2) * g
        with torch.no_grad():
            self.P.mul_(1 - rate * self.decay).sub_(rate * direction)
