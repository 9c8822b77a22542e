"""The rules inside a subspace, dense: each turns a projected gradient R (kept x r) into a direction of its shape."""

import torch


class Inner:
    def update(self, R, Q):
        """The step in the space of the gradient, before rate and scale."""
        return self.direction(R) @ Q.T


class AdamW(Inner):
    """Adam with the textbook's bias correction (Kingma and Ba, Algorithm 1); the decay is the caller's."""

    def __init__(self, betas, eps):
        self.betas, self.eps, self.t, self.M, self.V = betas, eps, 0, 0.0, 0.0

    def direction(self, R):
        beta1, beta2 = self.betas
        self.t += 1
        self.M = beta1 * self.M + (1 - beta1) * R
        self.V = beta2 * self.V + (1 - beta2) * R**2
        return (self.M / (1 - beta1**self.t)) / ((self.V / (1 - beta2**self.t)).sqrt() + self.eps)

    def rotate(self, C):
        self.M, self.V = self.M @ C, self.V @ C**2


class SGD(Inner):
    """Heavy ball: b <- momentum b + R, and b is the direction."""

    def __init__(self, momentum):
        self.momentum, self.b = momentum, 0.0

    def direction(self, R):
        self.b = self.momentum * self.b + R
        return self.b

    def rotate(self, C):
        self.b = self.b @ C


class Lion(Inner):
    """Chen et al., arXiv 2302.06675, Algorithm 2; the sign is taken in the subspace."""

    def __init__(self, betas):
        self.betas, self.m = betas, 0.0

    def interpolate(self, R):
        beta1, beta2 = self.betas
        c = beta1 * self.m + (1 - beta1) * R
        self.m = beta2 * self.m + (1 - beta2) * R
        return c

    def direction(self, R):
        return torch.sign(self.interpolate(R))

    def rotate(self, C):
        self.m = self.m @ C


class OriginalSpaceLion(Lion):
    """The sign is taken after the back-projection, of an element of the weight."""

    def update(self, R, Q):
        return torch.sign(self.interpolate(R) @ Q.T)


class Adafactor(Inner):
    """Shazeer and Stern, arXiv 1804.04235, Algorithm 4: no first moment, no relative step, no parameter scale."""

    def __init__(self):
        self.t, self.row, self.col = 0, 0.0, 0.0

    def direction(self, R):
        self.t += 1
        beta2 = 1 - self.t**-0.8
        squared = R**2 + 1e-30
        self.row = beta2 * self.row + (1 - beta2) * squared.mean(1)
        self.col = beta2 * self.col + (1 - beta2) * squared.mean(0)
        # row col^T / mean(row), divided first: a product of two squares can leave the range of fp32.
        U = R / torch.outer(self.row / self.row.mean(), self.col).sqrt()
        return U / max(1.0, U.square().mean().sqrt().item())

    def rotate(self, C):
        raise ValueError("factored second moments cannot be carried into another basis")


def make_inner(inner, betas, eps, momentum=0.0, lion_sign="subspace"):
    lion = {"subspace": Lion, "original": OriginalSpaceLion}[lion_sign]
    make = {
        "adamw": lambda: AdamW(betas, eps),
        "sgd": lambda: SGD(momentum),
        "lion": lambda: lion(betas),
        "adafactor": Adafactor,
    }
    return make[inner]()
