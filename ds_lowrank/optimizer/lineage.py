"""The optimizers of the methods around GaLore: one class for each, with its options.

They are as those of :mod:`ds_lowrank.optimizer.optimizers`.
"""

from __future__ import annotations

from typing import ClassVar

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.ldadam import LDAdamMethod
from ds_lowrank.methods.subtrack import SubTrackMethod
from ds_lowrank.optimizer.optimizer import LowRankOptimizer


class LDAdam(LowRankOptimizer):
    """LDAdam (arXiv 2410.16103): Adam in a subspace that follows the gradient in every step.

    Args:
        betas: Adam's, of projected matrices and of the other parameters; (0.908, 0.99).
        rank: columns of the basis, at most the smaller dimension of a matrix; 16.
        rho: the share of the momentum in what the basis follows, the rest is the gradient's; 0.908.
        error_feedback: whether what a step leaves out is kept, one number for every element, and added to the next
            gradient; False.
        projector: how the first basis is found, ``randomized`` (the default) or ``svd``, exact and on one rank.
        scale: multiplies the update of a projected matrix, not its weight decay; 1.0.
    """

    method: ClassVar[type[Method]] = LDAdamMethod


class SubTrack(LowRankOptimizer):
    """SubTrack++ (arXiv 2502.01586): GaLore whose subspace moves along geodesics, and what it leaves out, scaled.

    Args:
        rank: columns of the basis, at most the smaller dimension of a matrix; 128.
        update_proj_gap: optimizer steps between moves of the basis, T; 200.
        step_size: eta of a move, whose angle is at most a right one; 10.0.
        projection_aware: whether the moments follow the basis, or are kept in the old coordinates; True.
        recovery_scaling: whether what the subspace leaves out of the gradient is added, scaled; True.
        norm_growth_limit: zeta of the norm-growth limiter of what is added, or None for no limiter; 1.01.
        projector: how the first basis is found, ``randomized`` (the default) or ``svd``, exact and on one rank.
        basis_placement: whether a rank stores the rows of a basis that it owns, ``partitioned`` (the default), or keeps
            all that it computes with between moves, ``replicated``.
        scale: multiplies the part of the update in the subspace; 0.25.
    """

    method: ClassVar[type[Method]] = SubTrackMethod
