"""How the tests run Apollo."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row

NAME = "Apollo"
ROW = Row(
    small=SMALL,
    cases=[
        CASE,
        *(CASE | {"norm_growth_limit": limit} for limit in (None, 1.0)),
        CASE | {"proj_type": "left", "weight_decay": 0.1, "scale": 2.0},
        {"mini": True, "update_proj_gap": 2},
        CASE | {"ratio_moments": "uncorrected", "eps_root": "uncorrected", "weight_decay": 0.1},
        {"mini": True, "update_proj_gap": 2, "ratio_moments": "uncorrected", "weight_decay_order": "after"},
    ],
    grid=[CASE, {"mini": True, "update_proj_gap": 2}],
    engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4},
    costs=COSTS,
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
