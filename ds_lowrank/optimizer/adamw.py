"""AdamW for everything that is not projected: embeddings, the head, norms, biases.

An element's update depends on that element alone, so each rank updates the elements it holds and nothing is exchanged.
The exception are int8 moments: if two ranks hold elements of one block, one of them steps the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ds_lowrank.environment.apex import adamw_by, apex_adamw
from ds_lowrank.linalg.moments import fused_adamw
from ds_lowrank.methods.base import Options
from ds_lowrank.methods.blocks.full_rank_adam import full_rank_adam
from ds_lowrank.optimizer.slots import Slot, groups_of
from ds_lowrank.optimizer.step import buckets
from ds_lowrank.sharding.reduce import Rounds, lockstep


def adamw_step(slots: Sequence[Slot], options: Mapping[int, Options]) -> Rounds[None]:
    """One AdamW step on each slot, by a fused kernel if everything is fp32: apex's or torch's.

    Args:
        slots: not projected; those of the same parameters on all ranks.
        options: of each parameter group, by the group's ``id``.
    """
    fused = [slot for slot in slots if _is_fp32(slot)]
    for group in groups_of(fused):
        _fused_step([slot for slot in fused if slot.group is group and slot.shard.part.numel], options[id(group)])
    for bucket in buckets([slot for slot in slots if not _is_fp32(slot)]):
        yield from _quantized_step(bucket, options)
    for slot in slots:
        slot.state["step"] += 1


def _is_fp32(slot: Slot) -> bool:
    """Whether a fused kernel can step it. The same on all ranks, also on those that hold nothing of the parameter."""
    return slot.is_fp32 and slot.fragment.gradient.dtype == torch.float32


def _fused_step(slots: Sequence[Slot], options: Options) -> None:
    if not slots:
        return
    weights = [slot.fragment.weights for slot in slots]
    kernel = apex_adamw if adamw_by(weights[0].device) == "apex" else fused_adamw
    kernel(
        weights,
        [slot.fragment.gradient for slot in slots],
        [slot.state["exp_avg"].squeeze(1) for slot in slots],
        [slot.state["exp_avg_sq"].squeeze(1) for slot in slots],
        [slot.state["step"] for slot in slots],
        options.effective_lr,
        options.betas,
        options.eps,
        options.weight_decay,
    )
    for slot, stepped in zip(slots, weights, strict=True):
        slot.fragment.put(stepped)


def _quantized_step(slots: Sequence[Slot], options: Mapping[int, Options]) -> Rounds[None]:
    """A step whose moments, weights or gradients are not all fp32, in fp32 and rounded once."""
    states = [slot.state_store.decode(slot.state) for slot in slots]
    updates = yield from lockstep(
        full_rank_adam(slot.shard, state, options[id(slot.group)], slot.fragment.gradient.float)
        for slot, state in zip(slots, states, strict=True)
    )
    for slot, state, update in zip(slots, states, updates, strict=True):
        own = options[id(slot.group)]
        slot.shard.attach(slot.shard.flat_gradient, slot.fragment.weights)
        update.write_to(slot.shard, own.effective_lr, own.effective_lr * own.weight_decay)
        slot.fragment.put(slot.shard.weights)
        slot.shard.detach()
        slot.state_store.encode(slot.state, state)
