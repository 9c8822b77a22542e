"""The optimizers of the methods around GaLore: one class for each, with its options.

They are as those of :mod:`ds_lowrank.optimizer.optimizers`.
"""

from __future__ import annotations

from typing import ClassVar

from ds_lowrank.methods.base import Method
from ds_lowrank.methods.cosmos import CosmosMethod
from ds_lowrank.methods.fira import FiraMethod
from ds_lowrank.methods.flora import FloraMethod
from ds_lowrank.methods.frugal import FrugalMethod
from ds_lowrank.methods.gum import GumMethod
from ds_lowrank.methods.ldadam import LDAdamMethod
from ds_lowrank.methods.racs import RacsMethod
from ds_lowrank.methods.scale import ScaleMethod
from ds_lowrank.methods.subtrack import SubTrackMethod
from ds_lowrank.methods.sumo import SumoMethod
from ds_lowrank.methods.tandem import TandemMethod
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


class Fira(LowRankOptimizer):
    """Fira (arXiv 2410.01623): GaLore, and what its subspace leaves out, scaled as Adam scales in the subspace.

    Args:
        norm_growth_limit: gamma of the norm-growth limiter, or None for no limiter; 1.01.
        residual: what is left of the gradient, ``H - R Q^T`` in the ``paper`` (the default), or ``H - scale * R Q^T``
            in the ``official`` code.
        ratio_moments: of which moments phi is, bias-``corrected`` ones (the default), or ``uncorrected`` ones as in the
            official code.
        scaling: whether every kept row has a phi of its own, ``channel`` (the default), or the ``matrix`` has one.
        rank: columns of the basis, at most the smaller dimension of a matrix; 128.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
        update_proj_gap: optimizer steps that a basis lasts, T; 200.
        scale: alpha, multiplies the part of the update in the subspace; 0.25.
        projector: which basis, ``randomized`` (the default), ``svd``, ``random``, ``sampled`` or ``dct``, as in GaLore.
        power_steps: of the randomized range finder, 0 to 3; 1.
        moments: what a refresh does to the moments, ``keep`` (the default, as the official code) or ``rotate``.
        basis_placement: whether a rank stores the rows of a basis that it owns, ``partitioned`` (the default), or keeps
            all that it computes with between refreshes, ``replicated``.
        first_basis: what the first basis is taken from, the first ``gradient`` (the default) or ``random`` numbers.
        stagger: whether the matrices' refreshes are spread over the interval; False.
        cos_threshold: the similarity of successive bases from which on they last longer, as in Q-GaLore, or None for
            never; None.
        gamma_proj: what the time that a basis lasts is then multiplied by; 2.
        queue_size: how many bases in a row must be similar to the one before; 5.
        inner: what turns the projected gradient into a direction, ``adamw`` (the default), ``adafactor``, ``lion`` or
            ``sgd``.
        momentum: the momentum of ``inner`` ``sgd``; 0.0.
        lion_sign: where ``inner`` ``lion`` takes its sign, only in the ``subspace`` (the default).
        power_steps: of the randomized range finder, 0 to 3; 1.
    """

    method: ClassVar[type[Method]] = FiraMethod


class Frugal(LowRankOptimizer):
    """FRUGAL (arXiv 2411.07837): Adam in a subspace, and signs of the gradient outside of it.

    Args:
        state_free: the rule outside of the subspace, ``sign`` (the default) or ``sgd``.
        state_free_lr_scale: the rate of that rule, relative to ``lr * scale``; 1.0.
        rank: columns of the basis, at most the smaller dimension of a matrix; 128.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
        update_proj_gap: optimizer steps that a subspace lasts, T; 200.
        scale: multiplies both parts of the update of a projected matrix, not its weight decay; 1.0.
        projector: which subspace, the gradient's leading one by a ``randomized`` range finder (the default) or by
            ``svd``, a ``random`` one, or random ``columns``.
        power_steps: of the randomized range finder, 0 to 3; 1.
        moments: what a refresh does to the moments, ``reset`` (the default), ``keep`` or ``rotate``.
        basis_placement: whether a rank stores the rows of a basis that it owns, ``partitioned`` (the default), or keeps
            all that it computes with between refreshes, ``replicated``.
        first_basis: what the first basis is taken from, the first ``gradient`` (the default) or ``random`` numbers.
        stagger: whether the matrices' refreshes are spread over the interval; False.
        cos_threshold: the similarity of successive bases from which on they last longer, as in Q-GaLore, or None for
            never; None.
        gamma_proj: what the time that a basis lasts is then multiplied by; 2.
        queue_size: how many bases in a row must be similar to the one before; 5.
        inner: what turns the projected gradient into a direction, ``adamw`` (the default), ``adafactor``, ``lion`` or
            ``sgd``.
        momentum: the momentum of ``inner`` ``sgd``; 0.0.
        lion_sign: where ``inner`` ``lion`` takes its sign, only in the ``subspace`` (the default).
        power_steps: of the randomized range finder, 0 to 3; 1.
    """

    method: ClassVar[type[Method]] = FrugalMethod


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
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
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
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
    """

    method: ClassVar[type[Method]] = SubTrackMethod


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
        power_steps: of the randomized range finder, 0 to 3; 1.
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
        power_steps: of the randomized range finder, 0 to 3; 1.
    """

    method: ClassVar[type[Method]] = GumMethod


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


class Tandem(LowRankOptimizer):
    """Tandem, this project's own: an orthogonalized momentum in a subspace, and the gradient's rows outside of it.

    Args:
        rank: columns of the basis, at most the smaller dimension of a matrix; 128.
        update_proj_gap: optimizer steps that a basis lasts, T; 25.
        momentum: the share of the momentum that a step keeps, beta; 0.9.
        rest_weight: how long a direction outside the subspace is, relative to one in it, c; 2.0.
        scale: multiplies the update of a projected matrix, not its weight decay; 1.0.
        max_relative_step: the longest step of a matrix relative to its weights, in root mean squares, tau, or None for
            no limit; 0.05.
        basis_placement: whether a rank stores the rows of a basis that it owns, ``partitioned`` (the default), or keeps
            all that it computes with between refreshes, ``replicated``.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
        power_steps: of the randomized range finder, 0 to 3; 1.
    """

    method: ClassVar[type[Method]] = TandemMethod


class Cosmos(LowRankOptimizer):
    """COSMOS (arXiv 2502.17410): SOAP's Adam in a leading subspace that moves in every step, and Muon on the rest.

    Args:
        betas: of the momentum and of the second moment, also Adam's of the other parameters; (0.95, 0.95).
        beta3: of the average that the basis follows, or None for that of the second moment; None.
        rank: columns of the basis, at most the smaller dimension of a matrix; 64.
        gamma: the weight of Muon's part; 0.2.
        nesterov: whether the momentum is looked at a step ahead; True.
        projector: how the first basis is found, ``randomized`` (the default) or ``svd``, exact and on one rank.
        scale: the root mean square of a projected matrix's update, not of its weight decay; 0.2.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
    """

    method: ClassVar[type[Method]] = CosmosMethod
