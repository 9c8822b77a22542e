"""Making the methods known where other code calls ``deepspeed.initialize``."""

from __future__ import annotations

import torch

from ds_lowrank.environment.log import show_log
from ds_lowrank.integration.initialize import initialize
from ds_lowrank.integration.stock import allow_under_zero, replace_initialize
from ds_lowrank.optimizer.registry import OPTIMIZERS


def register() -> None:
    """Make the methods known to whatever calls ``deepspeed.initialize``: the Hugging Face Trainer, accelerate, TRL, ...

    :func:`ds_lowrank.initialize` takes the place of ``deepspeed.initialize``, so that a model's parameters get their
    names and the configuration is checked. It passes on whatever names none of the methods. Code that has imported the
    function itself before (``from deepspeed import initialize``) goes on calling DeepSpeed's: for that, the classes are
    added to ``torch.optim``, where DeepSpeed looks an unknown ``optimizer.type`` up, and to its list of the optimizers
    that ZeRO may wrap; call :func:`ds_lowrank.tag_parameters` on the model there. In a program without logging, the
    package's messages are written to standard error from now on, the role table among them. Idempotent.
    """
    for name, optimizer in OPTIMIZERS.items():
        setattr(torch.optim, name, optimizer)
    allow_under_zero()
    show_log()
    replace_initialize(initialize)
