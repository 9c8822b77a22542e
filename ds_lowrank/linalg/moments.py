"""Adam's two moments: a step, and a change of basis."""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw

PART_ELEMENTS = 2**22
"""Directions that replace gradients are computed for this many elements at a time."""


def adam(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    gradient: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> torch.Tensor:
    """One step of Adam as in Kingma and Ba, Algorithm 1, with epsilon outside the root of the corrected moment.

    ``M <- beta1 M + (1 - beta1) G``, ``V <- beta2 V + (1 - beta2) G^2``, and the direction is
    ``M / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + eps)``.

    Args:
        exp_avg: the first moment ``M``, of any shape, fp32, updated in place.
        exp_avg_sq: the second moment ``V``, same shape, fp32, updated in place.
        gradient: ``G``, same shape, fp32.
        betas: ``(beta1, beta2)``.
        eps: added to the root.
        step: ``t``, 1 for the first step.

    Returns:
        The direction to descend along, same shape, fp32.
    """
    # With learning rate -1 on zero weights, torch's fused AdamW leaves the direction there: one pass over memory.
    direction = torch.zeros_like(exp_avg)
    fused_adamw([direction], [gradient], [exp_avg], [exp_avg_sq], [step - 1], -1.0, betas, eps, weight_decay=0.0)
    return direction


def adam_in_place(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    gradient: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> torch.Tensor:
    """The same as :func:`adam`, with the direction in the place of the gradient and little memory beside it.

    Args:
        exp_avg: the first moment, contiguous, fp32, updated in place.
        exp_avg_sq: the second moment, likewise.
        gradient: same shape, contiguous, fp32, overwritten.
        betas: as there.
        eps: as there.
        step: as there.

    Returns:
        The gradient's tensor.
    """
    parts = (torch.split(tensor.view(-1), PART_ELEMENTS) for tensor in (exp_avg, exp_avg_sq, gradient))
    for first, second, own in zip(*parts, strict=True):
        own.copy_(adam(first, second, own, betas, eps, step))
    return gradient


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
    """One AdamW step of many tensors with torch's fused kernel; weights and moments are updated in place.

    Args:
        weights: the weights, fp32, at least one, all on one device.
        gradients: one per weight, same shapes, fp32.
        exp_avgs: first moments, same shapes, fp32.
        exp_avg_sqs: second moments, same shapes, fp32.
        steps: for each weight, the number of steps it has done before.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the corrected second moment.
        weight_decay: decoupled weight decay; multiplied by ``lr``.
    """
    # To the device in one piece, and without waiting for what the device still has to do.
    counts = torch.tensor(steps, dtype=torch.float32, device="cpu").to(weights[0].device, non_blocking=True)
    adamw(
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        list(counts.unbind()),
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
    """Carry a first moment from one basis into another, in place: ``M <- M rotation``, because it is linear.

    Args:
        moment: p x r or a stack, L x p x r, fp32.
        rotation: r x r or a stack, L x r x r, fp32: the old basis transposed times the new basis.
    """
    moment.copy_(moment @ rotation)


def rotate_second(moment: torch.Tensor, rotation: torch.Tensor) -> None:
    """Carry a second moment from one basis into another, in place: ``V <- V (rotation * rotation)``.

    That is how variances of independent coordinates change. The linear rule of the first moment could make it negative.

    Args:
        moment: p x r or a stack, L x p x r, fp32.
        rotation: r x r or a stack, L x r x r, fp32: the old basis transposed times the new basis.
    """
    moment.copy_(moment @ rotation.square())


def transport(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    rotation: torch.Tensor,
    betas: tuple[float, float],
    step: int,
) -> None:
    """Carry Adam's moments from one basis into another as LDAdam (arXiv 2410.16103) does, in place.

    The corrected moments ``m = M / (1 - beta1^t)`` and ``v = V / (1 - beta2^t)`` estimate mean and mean square of each
    coordinate. The mean is turned; the variance ``v - m^2`` is, as that of independent coordinates; and the new mean
    square is their sum, whose magnitude is taken because an estimate of a variance may be negative::

        M <- M C
        V <- (1 - beta2^t) |(v - m^2) (C * C) + (m C)^2|

    Args:
        exp_avg: the first moment ``M``: p x r or a stack, L x p x r, fp32.
        exp_avg_sq: the second moment ``V``, likewise.
        rotation: ``C``, the old basis transposed times the new basis: r x r or a stack, L x r x r, fp32.
        betas: ``(beta1, beta2)``.
        step: ``t``, the number of steps that the moments have seen, at least 1.
    """
    seen1, seen2 = (1 - beta**step for beta in betas)
    mean = exp_avg / seen1
    variance = (exp_avg_sq / seen2).addcmul_(mean, mean, value=-1)
    turned = mean @ rotation
    exp_avg_sq.copy_((variance @ rotation.square()).addcmul_(turned, turned).abs_().mul_(seen2))
    exp_avg.copy_(turned.mul_(seen1))
