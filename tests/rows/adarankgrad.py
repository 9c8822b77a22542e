"""How the tests run AdaRankGrad."""

from __future__ import annotations

from tests.rows.row import UNDER_ENGINES, Row, gradients_with

NAME = "AdaRankGrad"
CASE = {"rank_max": 6, "update_proj_gap": 2, "eps": 1.0}

ROW = Row(
    small={"rank_max": 3, "update_proj_gap": 3, "residual_tol": 0.3, "grad_norm_ratio_tol": 0.0},
    cases=[
        CASE,
        *(CASE | {"residual_tol": 0.02, "second_moment": rule} for rule in ("abs", "clamp", "squared")),
        CASE | {"rank_multiple": 4},
        CASE | {"power_steps": 2},
        CASE | {"rank_min": 4, "never_grow": True},
        CASE | {"grad_norm_tol": 100.0, "update_proj_gap": 50},
        CASE | {"grad_norm_ratio_tol": 0.95, "update_proj_gap": 50},
        CASE | {"proj_type": "reverse_std"},
        CASE | {"proj_type": "left", "weight_decay": 0.1, "scale": 1.0},
    ],
    engine={**UNDER_ENGINES, "rank_max": 6, "residual_tol": 0.3, "update_proj_gap": 4},
    costs={"rank_max": 4, "rank_min": 4, "update_proj_gap": 3},
    gradients=gradients_with(lambda k: 0.3 ** (k // 2)),  # equal pairs: it cuts between pairs, where the gap is wide
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
