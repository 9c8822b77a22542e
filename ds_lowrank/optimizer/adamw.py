"""AdamW for everything that is not projected: embeddings, the head, norms, biases.

An element's update depends on that element alone, so each rank updates the elements it holds and nothing is exchanged.
The exception are int8 moments: if two ranks hold elements of one block, one of them steps the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from ds_lowrank.environment.apex import adamw_by, apex_adamw
from ds_lowrank.linalg.moments import fused_adamw
from ds_lowrank.methods.base import Options
from ds_lowrank.methods.blocks.full_rank_adam import full_rank_adam
from ds_lowrank.optimizer.slots import Slot, groups_of
from ds_lowrank.optimizer.stack import Stack
from ds_lowrank.optimizer.stacks import Stacks
from ds_lowrank.sharding.elements import Piece
from ds_lowrank.sharding.reduce import Rounds, lockstep


def adamw_step(slots: Sequence[Slot], options: Mapping[int, Options], stacks: Stacks) -> Rounds[None]:
    """One AdamW step on each slot, by a fused kernel if everything is fp32: apex's or torch's.

    Args:
        slots: not projected; those of the same parameters on all ranks.
        options: of each parameter group, by the group's ``id``.
        stacks: remembers which parameters are stepped together.
    """
    fused = [slot for slot in slots if _is_fp32(slot)]
    for group in groups_of(fused):
        own = [slot for slot in fused if slot.group is group and slot.geometry.part.numel]
        for alike in _of_one_eps(own, options[id(group)]):
            _fused_step(alike, options[id(group)])
    for slot in fused:
        slot.state["step"] += 1
    for bucket in stacks.buckets([slot.matrix for slot in slots if not _is_fp32(slot)]):
        yield from _stacked_step(bucket)


def _is_fp32(slot: Slot) -> bool:
    """Whether a fused kernel can step it. The same on all ranks, also on those that hold nothing of the parameter."""
    gradient = slot.fragment.store.grad
    return slot.is_fp32 and gradient is not None and gradient.dtype == torch.float32


def _of_one_eps(slots: Sequence[Slot], options: Options) -> list[list[Slot]]:
    """Slots that one call of a kernel can step: its ``eps`` is one number, which may be a function of the step."""
    by_eps: dict[float, list[Slot]] = {}
    for slot in slots:
        by_eps.setdefault(options.eps_at(slot.state["step"] + 1), []).append(slot)
    return list(by_eps.values())


def _fused_step(slots: Sequence[Slot], options: Options) -> None:
    weights = [slot.fragment.weights for slot in slots]
    decays_after = options.weight_decay_order == "after"
    kernel = apex_adamw if adamw_by(weights[0].device) == "apex" else fused_adamw
    kernel(
        weights,
        [slot.fragment.gradient for slot in slots],
        [slot.state["exp_avg"].squeeze(1) for slot in slots],
        [slot.state["exp_avg_sq"].squeeze(1) for slot in slots],
        [slot.state["step"] for slot in slots],
        options.effective_lr,
        options.betas,
        options.eps_at(slots[0].state["step"] + 1),
        0.0 if decays_after else options.weight_decay,
    )
    if decays_after and options.decay:
        torch._foreach_mul_(weights, 1 - options.decay)
    for slot, stepped in zip(slots, weights, strict=True):
        slot.fragment.put(stepped)


def _stacked_step(stacks: Sequence[Stack]) -> Rounds[None]:
    """A step whose moments, weights or gradients are not all fp32, in fp32 and rounded once."""
    try:
        for stack in stacks:
            stack.attach()
        states = [stack.decoded() for stack in stacks]
        updates = yield from lockstep(
            full_rank_adam(stack.shard, state, stack.options, partial(_gradient, stack))
            for stack, state in zip(stacks, states, strict=True)
        )
        for stack, state, update in zip(stacks, states, updates, strict=True):
            update.write_to(stack.shard, stack.options.rate, stack.options.decay)
            stack.store(state)
    finally:
        for stack in stacks:
            stack.detach()


def _gradient(stack: Stack, piece: Piece) -> torch.Tensor:
    return stack.shard.gradient.values_at(piece)
