"""The optimizers of the methods around GaLore: one class for each, with its options.

They are as those of :mod:`ds_lowrank.optimizer.optimizers`.
"""

from __future__ import annotations
