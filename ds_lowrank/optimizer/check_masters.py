"""Whether ``master_weights`` agrees with how the weights are stored."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from ds_lowrank.collectives import global_rank
from ds_lowrank.errors import ConfigError
from ds_lowrank.optimizer.slots import Slot

logger = logging.getLogger("ds_lowrank")

ROUNDED_TO_NEAREST = (
    "weights in bf16 without fp32 copies are rounded to the nearest in each step, so that small updates vanish: set "
    "master_weights to false, which rounds stochastically"
)


def check_masters(slots: Sequence[Slot], wrapper: str) -> None:
    """Refuse ``master_weights`` false for weights in fp32 or fp16; warn if bf16 is rounded to the nearest.

    Args:
        slots: of this rank's optimizer.
        wrapper: what DeepSpeed has arranged the weights in, or ``none``.

    Raises:
        ConfigError: ``master_weights`` is false, and no weight is in bf16 or some are in fp16; or groups differ in it.
    """
    kept = {slot.matrix.options.master_weights for slot in slots}
    stored = {slot.fragment.store.dtype for slot in slots}
    if len(kept) > 1:
        raise ConfigError(
            "master_weights is true in some parameter groups and false in others: set it for all of them, as DeepSpeed "
            "keeps fp32 copies of all weights or of none"
        )
    if kept == {True}:
        if torch.bfloat16 in stored and global_rank() == 0:
            logger.warning(ROUNDED_TO_NEAREST)
        return
    if slots and (torch.bfloat16 not in stored or torch.float16 in stored):
        found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored))
        where, advice = "the weights are", "convert the model to bf16"
        if wrapper != "none":
            where, advice = "DeepSpeed keeps weights", "build the engine by ds_lowrank.initialize, with bf16.enabled"
        raise ConfigError(f"master_weights is false, but {where} in {found}: {advice}, or remove it")
