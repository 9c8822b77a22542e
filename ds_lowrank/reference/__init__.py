"""The methods as their papers write them: dense, fp32, one process, paper notation.

The tests compare the package with these. They import nothing from the rest of the package, so an error must be made
twice, in different words, to go unnoticed. Each file opens with its paper's equations, and is the shortest way to read
a method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ds_lowrank.reference.adarankgrad import DenseAdaRankGrad
from ds_lowrank.reference.apollo import DenseApollo
from ds_lowrank.reference.cosmos import DenseCosmos
from ds_lowrank.reference.fira import DenseFira
from ds_lowrank.reference.flora import DenseFlora
from ds_lowrank.reference.frugal import DenseFrugal
from ds_lowrank.reference.galore import DenseGaLore
from ds_lowrank.reference.gradnormlorp import DenseGradNormLoRP
from ds_lowrank.reference.gum import DenseGum
from ds_lowrank.reference.ldadam import DenseLDAdam
from ds_lowrank.reference.lorenza import DenseLorenza
from ds_lowrank.reference.online_subspace_descent import DenseOnlineSubspaceDescent
from ds_lowrank.reference.racs import DenseRacs
from ds_lowrank.reference.scale import DenseScale
from ds_lowrank.reference.subtrack import DenseSubTrack
from ds_lowrank.reference.sumo import DenseSumo
from ds_lowrank.reference.tandem import DenseTandem
from ds_lowrank.reference.vlorp import DenseVLoRP


class DenseMethod(Protocol):
    """A method on one matrix: ``step`` changes ``weight``, m x n, in place."""

    weight: torch.Tensor

    def step(self, G: torch.Tensor, lr: float | None = None) -> None:
        """Take one step on the gradient G, m x n, at ``lr`` or the learning rate it was built with."""


DENSE: dict[str, Callable[..., DenseMethod]] = {
    "GaLore": DenseGaLore,
    "OnlineSubspaceDescent": DenseOnlineSubspaceDescent,
    "VLoRP": DenseVLoRP,
    "Tandem": DenseTandem,
    "AdaRankGrad": DenseAdaRankGrad,
    "Apollo": DenseApollo,
    "GradNormLoRP": DenseGradNormLoRP,
    "Lorenza": DenseLorenza,
    "Scale": DenseScale,
    "Racs": DenseRacs,
    "Fira": DenseFira,
    "Frugal": DenseFrugal,
    "LDAdam": DenseLDAdam,
    "SubTrack": DenseSubTrack,
    "Sumo": DenseSumo,
    "Gum": DenseGum,
    "Flora": DenseFlora,
    "Cosmos": DenseCosmos,
}
"""The reference of every method by its name in ``optimizer.type``, called with the weight, its name and the options."""
