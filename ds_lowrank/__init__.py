"""Low-rank gradient projection under an unmodified DeepSpeed, the same update on every layout."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ds_lowrank.adapters.model import add_adapters, merge_adapters
from ds_lowrank.environment.apex import check_apex
from ds_lowrank.errors import CheckpointError, ConfigError, closest_name
from ds_lowrank.integration.forward_backward import forward_backward
from ds_lowrank.integration.initialize import initialize
from ds_lowrank.integration.mpu import make_grid
from ds_lowrank.integration.register import register
from ds_lowrank.integration.train_batch import train_batch
from ds_lowrank.integration.trainer import ForwardBackwardMixin
from ds_lowrank.optimizer.lineage import (
    Cosmos,
    Fira,
    Flora,
    Frugal,
    Gum,
    LDAdam,
    Racs,
    Scale,
    SubTrack,
    Sumo,
    Tandem,
)
from ds_lowrank.optimizer.optimizers import (
    AdaRankGrad,
    Apollo,
    GaLore,
    GradNormLoRP,
    Lorenza,
    OnlineSubspaceDescent,
    VLoRP,
)
from ds_lowrank.optimizer.registry import OPTIMIZERS
from ds_lowrank.placement.parameter_names import tag_fused, tag_parameters
from ds_lowrank.placement.stacks import tag_stack

if TYPE_CHECKING:
    from ds_lowrank.checkpoint.gather import whole_weights

__version__ = "0.1.0"

__all__ = [
    "AdaRankGrad",
    "Apollo",
    "CheckpointError",
    "ConfigError",
    "Cosmos",
    "Fira",
    "Flora",
    "ForwardBackwardMixin",
    "Frugal",
    "GaLore",
    "GradNormLoRP",
    "Gum",
    "LDAdam",
    "Lorenza",
    "OnlineSubspaceDescent",
    "Racs",
    "Scale",
    "SubTrack",
    "Sumo",
    "Tandem",
    "VLoRP",
    "add_adapters",
    "check_apex",
    "forward_backward",
    "initialize",
    "make_grid",
    "merge_adapters",
    "register",
    "tag_fused",
    "tag_parameters",
    "tag_stack",
    "train_batch",
    "whole_weights",
]

NEEDS_DEEPSPEED = {"whole_weights": "ds_lowrank.checkpoint.gather"}
"""What is imported when it is first used, because it imports DeepSpeed."""


def __getattr__(name: str) -> Any:
    """What imports DeepSpeed, and the optimizers of methods from outside this package.

    Raises:
        AttributeError: there is no such name; says which is nearest.
    """
    if name in NEEDS_DEEPSPEED:
        return getattr(import_module(NEEDS_DEEPSPEED[name]), name)
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    known = {*__all__, *OPTIMIZERS}
    closest = closest_name(name, known)
    hint = f"; did you mean {closest!r}?" if closest else f"; it has {', '.join(sorted(known))}"
    raise AttributeError(f"module 'ds_lowrank' has no attribute {name!r}{hint}")
