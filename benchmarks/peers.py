"""The optimizers of other packages that benchmarks compare with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch


def load_galore_adamw() -> Callable[..., torch.optim.Optimizer]:
    """Import ``galore_torch.GaLoreAdamW``, without bitsandbytes, which its package needs for the 8-bit variant only.

    Raises:
        ImportError: galore-torch or transformers, which it imports, is not installed.
    """
    stub = ModuleType("bitsandbytes.optim.optimizer")
    stub.Optimizer2State = object  # type: ignore[attr-defined]
    names = ("bitsandbytes", "bitsandbytes.optim", stub.__name__)
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update(dict.fromkeys(names, stub))
    try:
        optimizer: Callable[..., torch.optim.Optimizer] = import_module("galore_torch").GaLoreAdamW
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)
    return optimizer
