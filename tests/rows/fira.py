"""How the tests run Fira."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row

NAME = "Fira"
ROW = Row(
    small=SMALL,
    cases=[
        CASE,
        *(CASE | {"norm_growth_limit": limit} for limit in (None, 1.0)),
        CASE | {"residual": "official", "scaling": "matrix", "ratio_moments": "uncorrected"},
        CASE | {"residual": "official", "scale": 2.5, "proj_type": "left", "weight_decay": 0.1},
        CASE | {"moments": "rotate", "projector": "svd", "proj_type": "reverse_std"},
        CASE | {"inner": "adafactor", "first_basis": "random"},
        CASE | {"inner": "sgd", "momentum": 0.9, "moments": "rotate"},
    ],
    grid=[CASE, CASE | {"residual": "official", "scaling": "matrix", "projector": "svd"}],
    engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4, "scale": 0.25},
    costs=COSTS,
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
