"""Making the methods' names known to torch and DeepSpeed."""

from __future__ import annotations

import torch

from ds_lowrank.optimizer.registry import OPTIMIZERS


def register() -> None:
    """Make the method names known to stock ``deepspeed.initialize``, the Hugging Face Trainer and accelerate.

    DeepSpeed looks an unknown ``optimizer.type`` up in ``torch.optim``, and has a list of the optimizers that ZeRO may
    wrap: the classes are added to both. Idempotent. Call :func:`ds_lowrank.tag_parameters` on the model before
    DeepSpeed sees it.
    """
    for name, optimizer in OPTIMIZERS.items():
        setattr(torch.optim, name, optimizer)
    allow_under_zero()


def allow_under_zero() -> None:
    """Add the optimizers to DeepSpeed's list of what ZeRO may wrap. Idempotent."""
    from deepspeed.runtime.zero import utils

    known = utils.ZERO_SUPPORTED_OPTIMIZERS
    known.extend(optimizer for optimizer in OPTIMIZERS.values() if optimizer not in known)
