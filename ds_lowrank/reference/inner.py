"""Inner optimizers, dense: each turns a projected gradient R, kept x r, into a direction of the same shape.

    AdamW      M <- b1 M + (1 - b1) R,  V <- b2 V + (1 - b2) R^2,  N = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)
    SGD        b <- momentum b + R,  N = b
    Lion       c = b1 m + (1 - b1) R,  m <- b2 m + (1 - b2) R,  N = sign(c)
    Adafactor  row, col <- means of R^2 over the columns and over the rows,  U = R / sqrt(row col^T / mean(row)),
               N = U / max(1, rms(U))

Powers and roots are taken element by element. ``rotate(C)`` carries the moments into the basis ``Q_new`` if
``C = Q_old^T Q_new``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Inner(ABC):
    """One inner optimizer, with its moments."""

    @abstractmethod
    def direction(self, R: torch.Tensor) -> torch.Tensor:
        """Take one step: the direction N, kept x r, for the projected gradient R."""

    def rotate(self, C: torch.Tensor) -> None:
        """Carry the moments into another basis.

        Args:
            C: r x r.

        Raises:
            NotImplementedError: the moments are factored, and belong to one basis.
        """
        raise NotImplementedError

    def update(self, R: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
        """Take one step: the direction in the space of the gradient, ``N Q^T``, before learning rate and scale."""
        return self.direction(R) @ Q.T


class AdamW(Inner):
    """Adam with the bias correction of Kingma and Ba, Algorithm 1. Weight decay is left to the caller.

    With ``eps_root`` ``uncorrected`` it is ``sqrt(1 - b2^t) / (1 - b1^t) * M / (sqrt(V) + eps)``, as in transformers.
    """

    def __init__(self, betas: tuple[float, float], eps: float, eps_root: str = "corrected") -> None:
        self.betas, self.eps, self.eps_root, self.t = betas, eps, eps_root, 0
        self.M = self.V = torch.zeros(())

    def direction(self, R: torch.Tensor) -> torch.Tensor:
        """Update both moments; the bias-corrected first over the root of the second."""
        beta1, beta2 = self.betas
        self.t += 1
        self.M = beta1 * self.M + (1 - beta1) * R
        self.V = beta2 * self.V + (1 - beta2) * R**2
        if self.eps_root == "uncorrected":
            return self.correction * self.M / (self.V.sqrt() + self.eps)
        return (self.M / (1 - beta1**self.t)) / ((self.V / (1 - beta2**self.t)).sqrt() + self.eps)

    @property
    def correction(self) -> float:
        """``sqrt(1 - b2^t) / (1 - b1^t)``."""
        beta1, beta2 = self.betas
        return float((1 - beta2**self.t) ** 0.5 / (1 - beta1**self.t))

    def rotate(self, C: torch.Tensor) -> None:
        """Carry M exactly, and V as if the elements of a row of R were uncorrelated."""
        self.M, self.V = self.M @ C, self.V @ C**2


class SGD(Inner):
    """Heavy-ball momentum."""

    def __init__(self, momentum: float) -> None:
        self.momentum, self.b = momentum, torch.zeros(())

    def direction(self, R: torch.Tensor) -> torch.Tensor:
        """Update the momentum, which is the direction."""
        self.b = self.momentum * self.b + R
        return self.b

    def rotate(self, C: torch.Tensor) -> None:
        """Carry the momentum, exactly."""
        self.b = self.b @ C


class Lion(Inner):
    """Lion (Chen et al., arXiv 2302.06675, Algorithm 2), with the sign taken in the subspace."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.betas, self.m = betas, torch.zeros(())

    def interpolate(self, R: torch.Tensor) -> torch.Tensor:
        """Update the moment; what the sign is taken of."""
        beta1, beta2 = self.betas
        c = beta1 * self.m + (1 - beta1) * R
        self.m = beta2 * self.m + (1 - beta2) * R
        return c

    def direction(self, R: torch.Tensor) -> torch.Tensor:
        """Update the moment; signs."""
        return torch.sign(self.interpolate(R))

    def rotate(self, C: torch.Tensor) -> None:
        """Carry the moment, exactly."""
        self.m = self.m @ C


class OriginalSpaceLion(Lion):
    """Lion with the sign taken of each element of the weight's update, after the back-projection."""

    def update(self, R: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
        """Update the moment; signs of the lifted interpolation."""
        return torch.sign(self.interpolate(R) @ Q.T)


class Adafactor(Inner):
    """Adafactor (Shazeer and Stern, arXiv 1804.04235, Algorithm 4).

    Without a first moment, a relative step size or a scaling by the parameter. Its factored moment cannot be rotated.
    """

    def __init__(self) -> None:
        self.t = 0
        self.row = self.col = torch.zeros(())

    def direction(self, R: torch.Tensor) -> torch.Tensor:
        """Update the factors of the second moment; the gradient over its root, clipped to an RMS of one."""
        self.t += 1
        beta2 = 1 - self.t**-0.8
        squared = R**2 + 1e-30
        self.row = beta2 * self.row + (1 - beta2) * squared.mean(1)
        self.col = beta2 * self.col + (1 - beta2) * squared.mean(0)
        # row col^T / mean(row), divided first: a product of two squares can leave the range of fp32.
        U = R / torch.outer(self.row / self.row.mean(), self.col).sqrt()
        return U / max(1.0, U.square().mean().sqrt().item())


def make_inner(
    inner: str,
    betas: tuple[float, float],
    eps: float,
    momentum: float = 0.0,
    lion_sign: str = "subspace",
    eps_root: str = "corrected",
) -> Inner:
    """The inner optimizer of that name, with fresh moments."""
    match inner:
        case "sgd":
            return SGD(momentum)
        case "lion":
            return Lion(betas) if lion_sign == "subspace" else OriginalSpaceLion(betas)
        case "adafactor":
            return Adafactor()
    return AdamW(betas, eps, eps_root)
