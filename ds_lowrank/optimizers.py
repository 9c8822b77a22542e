"""The optimizers by the names they have in ``optimizer.type``."""

from __future__ import annotations

from ds_lowrank.methods import galore
from ds_lowrank.optimizer import LowRankOptimizer


class GaLore(LowRankOptimizer):
    """GaLore with AdamW for everything that is not projected.

    ``GaLore(model.named_parameters(), lr=1e-2, rank=128)``; the options are those of
    :class:`ds_lowrank.methods.galore.GaLoreOptions`.
    """

    method = galore.GaLore


OPTIMIZERS: dict[str, type[LowRankOptimizer]] = {GaLore.method.name: GaLore}
