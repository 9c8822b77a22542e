"""AdamW for everything that is not projected: embeddings, the head, norms, biases.

An element's update depends on that element alone, so a rank updates the elements it holds and no rank needs another.
"""

from __future__ import annotations

import torch

from ds_lowrank.linalg.moments import adam, fused_adamw
from ds_lowrank.methods.base import Options, State
from ds_lowrank.sharding.zero import Fragment


def init_elementwise_state(fragment: Fragment, options: Options) -> State:
    """Two moments of this rank's elements, flat."""
    size, device = fragment.end - fragment.start, fragment.store.device
    return {
        "exp_avg": torch.zeros(size, dtype=options.moment_dtype, device=device),
        "exp_avg_sq": torch.zeros(size, dtype=options.moment_dtype, device=device),
    }


def step_elementwise(work: list[tuple[Fragment, State]], options: Options, lr: float) -> None:
    """One AdamW step on each fragment, by torch's fused kernel where everything is fp32."""
    fused: list[tuple[Fragment, State]] = []
    single: list[tuple[Fragment, State]] = []
    for fragment, state in work:
        if fragment.start == fragment.end:
            continue
        fp32 = fragment.store.dtype == fragment.gradient.dtype == state["exp_avg"].dtype == torch.float32
        (fused if fp32 else single).append((fragment, state))
    if fused:
        fused_adamw(
            [fragment.weights for fragment, _ in fused],
            [fragment.gradient for fragment, _ in fused],
            [state["exp_avg"] for _, state in fused],
            [state["exp_avg_sq"] for _, state in fused],
            [state["step"] for _, state in fused],
            lr,
            options.betas,
            options.eps,
            options.weight_decay,
        )
    for fragment, state in single:
        _in_fp32(fragment, state, options, lr)


def _in_fp32(fragment: Fragment, state: State, options: Options, lr: float) -> None:
    gradient = fragment.gradient.float()
    direction = adam(state["exp_avg"], state["exp_avg_sq"], gradient, options.betas, options.eps, state["step"] + 1)
    weights = fragment.weights
    exact = weights.float()
    exact.mul_(1 - lr * options.weight_decay).sub_(direction, alpha=lr)
    if exact is not weights:
        weights.copy_(exact)
