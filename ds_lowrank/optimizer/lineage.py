"""The optimizers of the methods around GaLore: one class for each, with its options.

They are as those of :mod:`ds_lowrank.optimizer.optimizers`.
"""

from __future__ import annotations

from typing import ClassVar

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.flora import FloraMethod
from ds_lowrank.optimizer.optimizer import LowRankOptimizer


class Flora(LowRankOptimizer):
    """Flora (arXiv 2402.03293): momentum in a random subspace that changes, on Adafactor.

    Args:
        rank: columns of the random projection, at most the smaller dimension of a matrix; 256.
        kappa: optimizer steps that a random projection lasts; 1000.
        second_moment: Adafactor's of the whole gradient, ``factored`` (the default), or ``none``.
        newest_term: this step's term of the direction, ``exact`` (the default, as in the official code) or
            ``projected``, as all earlier ones.
        scale_parameter: whether a matrix's step is multiplied by the root mean square of its weights; True.
    """

    method: ClassVar[type[Method]] = FloraMethod
