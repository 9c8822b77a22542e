"""The optimizers of the methods around GaLore: one class for each, with its options.

They are as those of :mod:`ds_lowrank.optimizer.optimizers`.
"""

from __future__ import annotations

from typing import ClassVar

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.gum import GumMethod
from ds_lowrank.methods.sumo import SumoMethod
from ds_lowrank.optimizer.optimizer import LowRankOptimizer


class Sumo(LowRankOptimizer):
    """SUMO (arXiv 2505.24749): an exactly orthogonalized momentum in a subspace of the gradient.

    Args:
        proj_type: ``reverse_std`` (the default) compresses the larger dimension, ``std`` the smaller one, ``left`` the
            rows and ``right`` the columns.
        rank: columns of the basis, at most the smaller dimension of a matrix; 128.
        momentum: the share of the momentum that a step keeps, mu; 0.95.
        update_proj_gap: the most optimizer steps that a basis lasts, K; 200.
        grad_norm_tol: the share of the projected gradient's first norm at which a basis is used up; 0.0.
        norm_growth_limit: gamma of the norm-growth limiter, or None for no limiter; 1.1.
        complement: the weight of what the subspace leaves out of the gradient; 1.0.
        shape_scaling: whether the orthogonalized momentum is multiplied by the root of the larger dimension; True.
        scale: multiplies the update of a projected matrix, not its weight decay; 1.0.
        basis_placement: whether a rank stores the rows of a basis that it owns, ``partitioned`` (the default), or keeps
            all that it computes with between refreshes, ``replicated``.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
    """

    method: ClassVar[type[Method]] = SumoMethod


class Gum(LowRankOptimizer):
    """GUM (arXiv 2510.17802): Muon in a subspace, and on a few random matrices outside it; Muon itself at share 1.

    Args:
        rank: columns of the basis, at most the smaller dimension of a matrix; 128.
        update_proj_gap: optimizer steps that a basis and a choice of matrices last, K; 200.
        full_share: the probability that a matrix is stepped whole, q; 1 for Muon; 0.1.
        momentum: the share of the momentum that a step keeps, beta; 0.95.
        nesterov: whether the momentum is looked at a step ahead, as in Muon; False.
        orthogonalization: ``exact``, or by Muon's ``newton_schulz`` iteration (the default).
        projector: how the leading subspace is found, ``randomized`` (the default) or ``svd``, exact and on one rank.
        adjust_lr_fn: what an update is multiplied by for the shape of its matrix, ``none`` (the default), ``original``
            for ``sqrt(max(1, m / n))``, or ``match_rms_adamw`` for ``0.2 sqrt(max(m, n))``.
        scale: multiplies the update of a projected matrix, not its weight decay; 1.0.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
    """

    method: ClassVar[type[Method]] = GumMethod
