"""Adam's two moments, and what a change of basis does to them."""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw


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
        exp_avg, exp_avg_sq: the moments, fp32, updated in place.
        gradient: same shape, fp32.
        betas, eps: Adam's.
        step: 1 for the first step.

    Returns:
        The direction to descend along, fp32, same shape.
    """
    # torch's fused AdamW, at rate -1 on a zero weight without decay, leaves the direction: one pass over memory.
    direction = torch.zeros_like(exp_avg)
    fused_adamw([direction], [gradient], [exp_avg], [exp_avg_sq], [step - 1], -1.0, betas, eps, weight_decay=0.0)
    return direction


def fused_adamw(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """torch's fused AdamW kernel on tensors that are all fp32; weights and moments are changed in place.

    Args:
        steps: how many each tensor has done before.
    """
    adamw(
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.full((), step, dtype=torch.float32, device=w.device) for step, w in zip(steps, weights, strict=True)],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
    )


def rotate_first(moment: torch.Tensor, rotation: torch.Tensor) -> None:
    """Carry a first moment from one basis into another, in place: it is linear, ``M <- M rotation``.

    Args:
        moment: p x r, fp32.
        rotation: r x r, old basis transposed times new basis, fp32.
    """
    moment.copy_(moment @ rotation)


def rotate_second(moment: torch.Tensor, rotation: torch.Tensor) -> None:
    """Carry a second moment: the variance of independent coordinates, ``V <- V (rotation * rotation)``, in place.

    The linear rule of the first moment would make it negative.
    """
    moment.copy_(moment @ rotation.square())
