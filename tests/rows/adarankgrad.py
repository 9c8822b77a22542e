"""How the tests run AdaRankGrad."""

from __future__ import annotations

import torch

from tests.rows.row import UNDER_ENGINES, Gradients, Row, Shape

NAME = "AdaRankGrad"
CASE = {"rank_max": 6, "update_proj_gap": 2, "eps": 1.0}


def paired_spectrum_gradients(shape: Shape) -> Gradients:
    """Gradients whose singular values come in equal pairs, each 0.3 times the pair before, turned in every step.

    AdaRankGrad cuts between pairs: how far a rounding error turns its subspace is one over the gap at the cut.
    """

    def gradient(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        k = min(shape)
        u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in shape)
        return 10 * u * 0.3 ** (torch.arange(k) // 2) @ v.T

    return gradient


ROW = Row(
    small={"rank_max": 3, "update_proj_gap": 3, "residual_tol": 0.3},
    cases=[
        CASE,
        *(CASE | {"residual_tol": 0.02, "second_moment": rule} for rule in ("abs", "clamp", "squared")),
        CASE | {"rank_multiple": 4},
        CASE | {"power_steps": 2},
        CASE | {"rank_min": 4, "never_grow": True},
        CASE | {"grad_norm_tol": 100.0, "update_proj_gap": 50},
        CASE | {"proj_type": "reverse_std"},
        CASE | {"proj_type": "left", "weight_decay": 0.1, "scale": 1.0},
    ],
    engine={**UNDER_ENGINES, "rank_max": 6, "residual_tol": 0.3, "update_proj_gap": 4},
    costs={"rank_max": 4, "rank_min": 4, "update_proj_gap": 3},
    gradients=paired_spectrum_gradients,
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
