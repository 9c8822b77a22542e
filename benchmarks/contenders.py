"""The optimizers that ``benchmarks/methods.py`` compares, and where their sweeps begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from ds_lowrank.methods import METHODS

GAP = 50
"""Optimizer steps that a basis lasts, for every method that has an interval of its own."""


@dataclass(frozen=True)
class Contender:
    """An optimizer, its options, and where the sweep of its matrices' rate begins.

    Attributes:
        name: The label in the table.
        type: DeepSpeed's ``optimizer.type``.
        params: DeepSpeed's ``optimizer.params``, without ``lr`` and ``scale``.
        scale: The first factor on the learning rate of the matrices.
    """

    name: str
    type: str
    params: Mapping[str, Any]
    scale: float

    @property
    def has_scale(self) -> bool:
        """Whether ``scale`` is an option of the method; otherwise the matrices get a learning rate of their own."""
        return self.type in METHODS and METHODS[self.type].Options.rate_key in METHODS[self.type].Options.model_fields

    def optimizer(self, lr: float, scale: float) -> dict[str, Any]:
        """Return DeepSpeed's ``optimizer`` entry."""
        own = {"scale": scale} if self.has_scale else {}
        return {"type": self.type, "params": {**self.params, "lr": lr, **own}}


def contenders(width: int) -> tuple[Contender, ...]:
    """Return AdamW and every method, at a quarter of the width as rank, or with as much state in another form.

    Args:
        width: The model's hidden size.
    """
    rank, gap = width // 4, {"update_proj_gap": GAP}
    basis = {"rank": rank, **gap}
    eight_bits = {"state_dtype": "int8", "basis_dtype": "int4"}
    slow_basis = {"basis_lr_ratio": 5 / 8}  # at a rate of 0.08 the basis moves at 0.05, as in the published recipe
    muon = {"full_share": 1.0, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    return (
        Contender("AdamW", "AdamW", {"torch_adam": True}, 1 / 32),
        Contender("AdamW-0.95", "AdamW", {"torch_adam": True, "betas": [0.9, 0.95]}, 1 / 32),
        Contender("Tandem", "Tandem", {"rank": rank}, 1 / 4),
        Contender("Tandem-Mini", "Tandem", {"rank": width // 8, **eight_bits}, 1 / 4),
        Contender("Muon", "Gum", muon, 1 / 4),
        Contender("Fira", "Fira", {**basis, "scale": 1.0, "moments": "rotate"}, 1 / 16),
        Contender("Apollo", "Apollo", basis, 1 / 4),
        Contender("GaLore", "GaLore", basis, 1 / 8),
        Contender("VLoRP", "VLoRP", {"rank": 4, "granularity": rank // 4, **gap}, 1 / 16),
        Contender("Scale", "Scale", {}, 1 / 16),
        Contender("Sumo", "Sumo", basis, 1 / 32),
        Contender("Apollo-Mini", "Apollo", {"mini": True, **gap}, sqrt(2)),
        Contender("Racs", "Racs", {}, 1 / 20),
        Contender("Frugal", "Frugal", basis, 1 / 16),
        Contender("SubTrack", "SubTrack", {**basis, "scale": 1.0}, 1 / 16),
        Contender("LDAdam", "LDAdam", {"rank": rank}, 1 / 16),
        Contender("Gum", "Gum", {**basis, "full_share": 0.25, "adjust_lr_fn": "match_rms_adamw"}, 1 / 8),
        Contender("Flora", "Flora", {"rank": rank, "kappa": GAP}, 1 / 2),
        Contender("OnlineSubspaceDescent", "OnlineSubspaceDescent", {"rank": rank, **slow_basis}, 1 / 16),
        Contender("AdaRankGrad", "AdaRankGrad", {"rank_max": rank, **gap}, 1 / 16),
        Contender("GradNormLoRP", "GradNormLoRP", basis, 1 / 16),
        Contender("Lorenza", "Lorenza", basis, 1 / 16),
        Contender("GaLore-random", "GaLore", {**basis, "projector": "random"}, 1 / 16),
        Contender("GaLore-DCT", "GaLore", {**basis, "projector": "dct"}, 1 / 16),
        Contender("Cosmos", "Cosmos", {"rank": rank}, 1 / 16),
    )
