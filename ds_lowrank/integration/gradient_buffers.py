"""Gradients of a step that DeepSpeed keeps in buffers beyond that step, or does not get as far as the optimizer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from deepspeed import DeepSpeedEngine


def repair_gradient_buffers(engine: DeepSpeedEngine) -> None:
    """Make every step of an engine at ZeRO 3, or with optimizer offload, see its own gradients and all of them.

    DeepSpeed 0.19.8 keeps them in buffers that the next backward pass overwrites, but only for the parameters that it
    reaches. Any other one would be stepped with its old gradient again, or with the one that was not finite and for
    which the last step was skipped; and what later micro-batches bring would be added to an old gradient. So the
    buffers are zeroed after each step. With offload and gradient accumulation, what a parameter had from earlier
    micro-batches is lost if the last one does not reach it. So it is moved on before the step.

    Args:
        engine: an engine whose optimizer is one of this package; its wrapper's ``step`` may be replaced.
    """
    offloads = engine.zero_use_cpu_optimizer()
    if engine.zero_optimization_stage() != 3 and not offloads:
        return
    wrapper = engine.optimizer
    stores = list({id(s.fragment.store): s.fragment.store for s in engine.basic_optimizer.slots}.values())
    inner = wrapper.step

    @functools.wraps(inner)
    def step(*args: Any, **named: Any) -> Any:
        if offloads and _has_left_some(wrapper):
            wrapper.finalize_gradient_accumulation_boundary()
        result = inner(*args, **named)
        _forget(wrapper, stores)
        return result

    engine.optimizer.step = step


def _has_left_some(wrapper: Any) -> bool:
    """Whether a parameter got a gradient in this step, and DeepSpeed has not moved it to where it is stepped."""
    reached = wrapper._offload_boundary_param_ids if _is_stage3(wrapper) else wrapper._offload_accumulated_param_ids
    return len(reached) > len(wrapper.norm_for_param_grads)  # of those that it has moved, it knows the norms


def _forget(wrapper: Any, stores: list[torch.Tensor]) -> None:
    """Zero the buffers, which are wherever the gradients are stepped."""
    for store in stores:
        if store.grad is not None:
            store.grad.zero_()
    if _is_stage3(wrapper):
        wrapper.grad_partitions_flat_buffer.zero_()
    else:
        wrapper.averaged_gradients.update(dict.fromkeys(wrapper.averaged_gradients))  # as DeepSpeed after a whole step
    for gradient in getattr(wrapper, "accumulated_grads_in_cpu", {}).values():
        gradient.zero_()


def _is_stage3(wrapper: Any) -> bool:
    return hasattr(wrapper, "grad_partitions_flat_buffer")
