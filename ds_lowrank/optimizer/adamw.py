"""AdamW for everything that is not projected: embeddings, the head, norms, biases.

An element's update depends on that element alone, so a rank updates the elements it holds and no rank needs another;
but for moments of eight bits, where the elements of a block that two ranks hold are stepped by one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_lowrank.environment.apex import adamw_by, apex_adamw
from ds_lowrank.linalg.moments import fused_adamw
from ds_lowrank.methods.blocks.full_rank_adam import full_rank_adam
from ds_lowrank.methods.blocks.options import Options
from ds_lowrank.optimizer.slots import Slot
from ds_lowrank.optimizer.step import buckets, groups_of
from ds_lowrank.sharding.reduce import Rounds, lockstep


def adamw_step(slots: Sequence[Slot], options: dict[int, Options]) -> Rounds[None]:
    """One AdamW step on each, by a fused kernel where everything is fp32: apex's or torch's.

    Args:
        options: of each group, by its id.
    """
    fused = [slot for slot in slots if _is_fp32(slot)]
    for group in groups_of(fused):
        _step_fused([slot for slot in fused if slot.group is group and slot.shard.part.numel], options[id(group)])
    coded = [slot for slot in slots if not _is_fp32(slot)]
    for bucket in buckets(coded):
        yield from _step_coded(bucket, options)


def _is_fp32(slot: Slot) -> bool:
    """The same on all ranks, also on those that hold nothing of the parameter."""
    return slot.is_fp32 and slot.fragment.gradient.dtype == torch.float32


def _step_fused(slots: Sequence[Slot], options: Options) -> None:
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


def _step_coded(slots: Sequence[Slot], options: dict[int, Options]) -> Rounds[None]:
    opened = [slot.state_store.decode(slot.state) for slot in slots]
    updates = yield from lockstep(
        full_rank_adam(slot.shard, state, options[id(slot.group)], state["step"], slot.fragment.gradient.float)
        for slot, state in zip(slots, opened, strict=True)
    )
    for slot, state, update in zip(slots, opened, updates, strict=True):
        own = options[id(slot.group)]
        weights = slot.fragment.weights
        slot.shard.write(weights, update, own.effective_lr, own.effective_lr * own.weight_decay)
        slot.fragment.put(weights)
        slot.state_store.encode(slot.state, state)
