"""Low-rank gradient projection under an unmodified DeepSpeed, the same update on every layout."""

from typing import Any

from ds_lowrank.adapters.model import add_adapters, merge_adapters
from ds_lowrank.errors import CheckpointError, ConfigError
from ds_lowrank.integration.forward_backward import forward_backward
from ds_lowrank.integration.initialize import initialize
from ds_lowrank.integration.register import register
from ds_lowrank.integration.train_batch import train_batch
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.placement.parameter_names import tag_fused, tag_parameters

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "add_adapters",
    "forward_backward",
    "initialize",
    "merge_adapters",
    "register",
    "tag_fused",
    "tag_parameters",
    "train_batch",
    *OPTIMIZERS,
]


def __getattr__(name: str) -> Any:
    """Every method's optimizer under its name: ``ds_lowrank.GaLore`` and so on."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    raise AttributeError(f"module 'ds_lowrank' has no attribute {name!r}; the methods are {', '.join(OPTIMIZERS)}")
