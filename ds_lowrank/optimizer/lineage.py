"""The optimizers of the methods around GaLore: one class for each, with its options.

They are as those of :mod:`ds_lowrank.optimizer.optimizers`.
"""

from __future__ import annotations

from typing import ClassVar

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.racs import RacsMethod
from ds_lowrank.methods.scale import ScaleMethod
from ds_lowrank.optimizer.optimizer import LowRankOptimizer


class Racs(LowRankOptimizer):
    """RACS (arXiv 2502.07752): the gradient, with its rows and its columns scaled.

    Args:
        beta: of the averages of both scalings; 0.9.
        iterations: how often their fixed-point equation is applied in each step; 5.
        scale: the paper's alpha, multiplies the update of a projected matrix, not its weight decay; 0.05.
        norm_growth_limit: gamma of the norm-growth limiter, or None for no limiter; 1.01.
    """

    method: ClassVar[type[Method]] = RacsMethod


class Scale(LowRankOptimizer):
    """SCALE (arXiv 2506.16659): the gradient, with each output unit brought to the same length. It stores nothing.

    Args:
        proj_type: over which dimension lengths are taken, ``right`` for those of output units (the default), ``left``
            for those of input units, ``std`` over the smaller dimension or ``reverse_std`` over the larger.
        scale: multiplies the update of a projected matrix, not its weight decay; 1.0.
        normalization: whether the root mean square of a unit becomes one, ``rms`` (the default, as the official code),
            or its ``length``, as in the paper.
        momentum: of the gradient, stored for each element if above 0, as published for the output head only; 0.0.
    """

    method: ClassVar[type[Method]] = ScaleMethod
