"""How the tests run Tandem."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row

NAME = "Tandem"
ROW = Row(
    small=SMALL,
    cases=[
        CASE,
        CASE | {"proj_type": "reverse_std", "momentum": 0.5, "max_relative_step": None},
        CASE | {"proj_type": "left", "weight_decay": 0.1, "scale": 0.5, "max_relative_step": 1e-4},
        CASE | {"rest_weight": 0.0, "max_relative_step": 1e-3},
        CASE | {"rest_weight": 0.5, "power_steps": 0},
        CASE | {"rank": 20},
    ],
    grid=[CASE, CASE | {"proj_type": "reverse_std"}],
    engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4, "scale": 0.25},
    costs=COSTS,
    first_step_ignores_size=True,
    keeps_zeros=True,
)
