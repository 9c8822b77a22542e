"""Adam's two moments, and what a change of basis does to them."""

from __future__ import annotations

import torch


def adam(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    gradient: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> torch.Tensor:
    """One step of textbook Adam (Kingma and Ba, Algorithm 1: epsilon outside the root of the corrected moment).

    Args:
        exp_avg, exp_avg_sq: the moments, any float dtype, updated in place. The arithmetic is fp32.
        gradient: same shape, fp32.
        betas, eps: Adam's.
        step: 1 for the first step.

    Returns:
        The direction to descend along, fp32, same shape.
    """
    beta1, beta2 = betas
    first, second = exp_avg.float(), exp_avg_sq.float()
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = second.sqrt().mul_((1 - beta2**step) ** -0.5).add_(eps)
    direction = torch.div(first, root, out=root).mul_(1 / (1 - beta1**step))
    if first is not exp_avg:
        exp_avg.copy_(first)
    if second is not exp_avg_sq:
        exp_avg_sq.copy_(second)
    return direction


def rotate(exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, rotation: torch.Tensor) -> None:
    """Carry both moments from one basis into another, in place.

    The first moment is linear, ``M <- M rotation``. The second is taken as the variance of independent coordinates,
    ``V <- V (rotation * rotation)``: the linear rule would make it negative.

    Args:
        exp_avg, exp_avg_sq: p x r.
        rotation: r x r, old basis transposed times new basis, fp32.
    """
    exp_avg.copy_(exp_avg.float() @ rotation)
    exp_avg_sq.copy_(exp_avg_sq.float() @ rotation.square())
