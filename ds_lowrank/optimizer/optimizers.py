"""The optimizers that users name: one class for each method, with its options.

Every class takes ``params`` and ``grid`` as :class:`ds_lowrank.optimizer.optimizer.LowRankOptimizer` does, and its
options as keywords: those listed here, and those of every method, which are listed there.
"""

from __future__ import annotations

from typing import ClassVar

from ds_lowrank.methods.adarankgrad import AdaRankGradMethod
from ds_lowrank.methods.apollo import ApolloMethod
from ds_lowrank.methods.base import Method
from ds_lowrank.methods.galore import GaLoreMethod
from ds_lowrank.methods.gradnormlorp import GradNormLoRPMethod
from ds_lowrank.methods.lorenza import LorenzaMethod
from ds_lowrank.methods.online_subspace_descent import OnlineSubspaceDescentMethod
from ds_lowrank.methods.vlorp import VLoRPMethod
from ds_lowrank.optimizer.optimizer import LowRankOptimizer


class AdaRankGrad(LowRankOptimizer):
    """AdaRankGrad (arXiv 2410.17881): Adam in a subspace whose rank follows the gradient.

    Args:
        rank_max: the largest rank; 128.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
        rank_min: the smallest rank, if the gradient has so many directions; 1.
        residual_tol: the share of the gradient's squared norm that a subspace may leave out, eta; 0.2.
        rank_multiple: ranks are rounded up to a multiple of it; 1.
        never_grow: whether a rank may only shrink; False.
        grad_norm_ratio_tol: the share of its first projected gradient's norm at which a subspace is used up; 0.25.
        grad_norm_tol: the norm of the projected gradient at which a subspace is used up; 1e-4.
        update_proj_gap: the most optimizer steps that a subspace lasts; 200.
        second_moment: what a change of basis C does to V, ``abs`` for ``|V C|``, ``clamp`` for ``max(V C, 0)``, or
            ``squared`` for ``V (C * C)``, the default.
        basis_placement: whether a rank stores the rows of a basis that it owns, ``partitioned`` (the default), or keeps
            all that it computes with between refreshes, ``replicated``.
        power_steps: of the randomized range finder, 0 to 3; 1.
        scale: multiplies the update of a projected matrix, not its weight decay; 0.25.
    """

    method: ClassVar[type[Method]] = AdaRankGradMethod


class Apollo(LowRankOptimizer):
    """APOLLO and APOLLO-Mini (arXiv 2412.05270): Adam's step size for every channel, from a random projection.

    Args:
        mini: APOLLO-Mini: rank 1, one factor per matrix, and a scale of sqrt(128) unless another is given; False.
        rank: columns of the random projection; 128.
        scale: the paper's alpha (the official code's ``scale`` is its square); 1.0.
        update_proj_gap: optimizer steps that a random projection lasts, T; 200.
        norm_growth_limit: gamma of the norm-growth limiter, or None for no limiter; 1.01.
        ratio_moments: of which moments the ratio of lengths is taken, bias-``corrected`` ones (the default), or
            ``uncorrected`` ones as in the official code.
    """

    method: ClassVar[type[Method]] = ApolloMethod


class GaLore(LowRankOptimizer):
    """GaLore (arXiv 2403.03507): Adam in a subspace of the gradient.

    Args:
        rank: columns of the basis, at most the smaller dimension of a matrix; 128.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
        update_proj_gap: optimizer steps that a basis lasts, T; 200.
        scale: the paper's alpha, multiplies the update of a projected matrix, not its weight decay; 0.25.
        projector: which basis, of the leading subspace by a ``randomized`` range finder (the default) or by an exact
            ``svd``, a ``random`` one, ``sampled`` singular vectors, or columns of the DCT matrix, ``dct``.
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
        lion_sign: where ``inner`` ``lion`` takes its sign, in the ``subspace`` (the default) or in the ``original``
            space.
    """

    method: ClassVar[type[Method]] = GaLoreMethod


class GradNormLoRP(LowRankOptimizer):
    """GradNormLoRP (arXiv 2412.19616): weights in magnitude and direction, GaLore on the direction.

    Args:
        parametrization: ``full`` for whole weights (the default), or ``adapter`` for adapters A and B in the model.
        norm_axis: what has a magnitude, each ``output`` unit (the default) or each ``input`` unit.
        rank: columns of the basis, at most the smaller dimension of a matrix; 128.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
        update_proj_gap: optimizer steps that a basis lasts, T; 250.
        scale: multiplies the update of the direction, not its weight decay; 0.25.
        projector: which basis, ``randomized`` (the default), ``svd``, ``random``, ``sampled`` or ``dct``, as in GaLore.
        power_steps: of the randomized range finder, 0 to 3; 1.
        moments: what a refresh does to the moments, ``keep`` (the default) or ``rotate``.
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
        lion_sign: where ``inner`` ``lion`` takes its sign, in the ``subspace`` (the default) or in the ``original``
            space.
        adapter_rank: columns of B and rows of A; 8.
        adapter_alpha: ``B A`` is scaled by ``adapter_alpha / adapter_rank``; 16.0.
        adapter_dropout: dropout on the input of the adapter's path; 0.0.
        detach_norm: whether the adapter's norm counts as a constant in the backward pass, as in peft's DoRA; False.
        modules_to_save: globs of modules that are trained as they are, next to the adapters; None for new task heads.
    """

    method: ClassVar[type[Method]] = GradNormLoRPMethod


class Lorenza(LowRankOptimizer):
    """LORENZA and AdaZo-SAM (arXiv 2502.19571): a projected step on the gradient where the loss is higher.

    Its gradient must be taken by :func:`ds_lowrank.forward_backward`, or :func:`ds_lowrank.train_batch` in a pipeline.

    Args:
        rank: columns of the basis, or None for AdaZo-SAM, on whole gradients; 128.
        basis_dtype: how bases are stored between steps, ``fp32`` (the default), ``bf16`` or ``int4``.
        update_proj_gap: optimizer steps that a basis lasts, T; 200.
        scale: multiplies the update of a projected matrix, not its weight decay; 1.0.
        probes: random directions per step, q; 1.
        probe_radius: how far each probe goes, mu; 1e-3.
        perturbation_radius: how far the gradient is taken from the weights, rho; 0 for no perturbation; 0.05.
        two_sided: whether a probe looks at both sides of the weights, or compares one side with the weights; True.
        probe_form: ``diagonal`` for ``F diag(u) Q^T`` (the default), or ``gaussian`` for ``U Q^T``.
        right_factor: what F is, the orthogonal factor of ``H Q`` (``qr``, the default) or its left singular vectors, in
            pairs with Q (``svd``).
        norm: over what ``|G_pert|`` is taken, ``global`` for all matrices (the default), or ``per_matrix``.
        moment_on_refresh: what a refresh does to the moments, ``rotate`` (the default), ``keep`` or ``reset``.
        accumulation: ``per_step`` for one perturbation for all micro-batches (the default), or ``per_micro_batch``.
        basis_placement: whether a rank stores the rows of a basis that it owns, ``partitioned`` (the default), or keeps
            all that it computes with between refreshes, ``replicated``.
        power_steps: of the randomized range finder, 0 to 3; 1.
        orthogonal_component: Lorenza+: whether what the subspace leaves out of the gradient is added; False.
        orthogonal_scale: s, which multiplies that, or ``norm_ratio`` for ``|N_i| / |R_i|`` in each row; 1.0.
    """

    method: ClassVar[type[Method]] = LorenzaMethod


class OnlineSubspaceDescent(LowRankOptimizer):
    """Online Subspace Descent (arXiv 2408.12857): GaLore whose basis moves a little in every step.

    Args:
        rank: columns of the basis, at most the smaller dimension of a matrix; 128.
        basis_dtype: how the basis is stored between steps, ``fp32`` (the default) or ``bf16``.
        scale: the paper's alpha, multiplies the update of a projected matrix, not its weight decay; 0.25.
        inner: what turns the projected gradient into a direction, ``adamw`` (the default), ``adafactor``, ``lion`` or
            ``sgd``.
        momentum: the momentum of ``inner`` ``sgd``; 0.0.
        lion_sign: where ``inner`` ``lion`` takes its sign, in the ``subspace`` (the default) or in the ``original``
            space.
        pca_lambda: the weight of the term that keeps the basis near orthonormal, lambda; 0.1.
        pca_norm: what the gradient is divided by in the PCA loss, the norm of the ``gradient`` (the default) or of its
            ``projected`` form.
        basis_lr_ratio: the basis moves at ``basis_lr_ratio * lr``; 5.0.
        basis_optimizer: what steps the basis, ``adam`` (the default), ``sgd``, ``lion``, ``adafactor`` or a class of
            yours as ``"module:Class"``, or ``random``, which draws another basis instead.
        basis_betas: the betas of ``basis_optimizer``, or None for ``betas``; None.
        update_proj_gap: with ``basis_optimizer`` ``random``, optimizer steps that a basis lasts; 200.
        basis_init: the first basis, of the first gradient by a ``randomized`` range finder (the default) or by ``svd``,
            or ``random``.
        basis_weight_decay: the decoupled weight decay of the basis, or None for ``weight_decay``; None.
    """

    method: ClassVar[type[Method]] = OnlineSubspaceDescentMethod


class VLoRP(LowRankOptimizer):
    """VLoRP with ProjFactor (arXiv 2505.01744): random projections of pieces of a row, or of several rows.

    Args:
        rank: columns of the projection, r; 4.
        granularity: units per row, c, as a number or as ``"p/q"``; below 1, one unit is 1/c rows; 64.
        update_scheme: ``projfactor`` (the default), ``subspace``, ``original_space``, or ``sgd``, which has no state.
        scale: the official code's, multiplies what is lifted: an epsilon of ``eps / scale`` with ``projfactor`` and
            ``original_space``, a factor on the update with ``subspace`` and ``sgd``; 1.0.
        distribution: of the projection, ``gaussian`` (the default) or ``rademacher``.
        update_proj_gap: optimizer steps that a projection lasts; 100.
        moment_on_resample: what a new projection does to the moments, ``keep`` (the default), ``reset`` or
            ``reproject``.
        left_view: how a wide matrix is cut into units, as its ``transpose`` (the default) or as in the ``official``
            code.
        eps: added to the root of the second moment; 1e-6.
        eps_position: ProjFactor: eps ``outside`` the root (the default) or ``inside``.
        bias_correction: ProjFactor: ``sqrt`` (the default) for ``sqrt(1 - beta2^t) / (1 - beta1^t)``, or ``linear``
            for ``(1 - beta2^t) / (1 - beta1^t)``.
    """

    method: ClassVar[type[Method]] = VLoRPMethod
