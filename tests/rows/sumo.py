"""How the tests run Sumo."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row

NAME = "Sumo"
ROW = Row(
    small=SMALL,
    cases=[
        CASE,
        CASE | {"complement": 0.0, "proj_type": "std"},
        CASE | {"complement": 0.5, "scale": 0.1, "weight_decay": 0.1, "proj_type": "left"},
        CASE | {"norm_growth_limit": None, "shape_scaling": False, "momentum": 0.5},
        {"rank": 3, "update_proj_gap": 10, "grad_norm_tol": 0.95, "complement": 0.0},
    ],
    grid=[CASE, CASE | {"complement": 0.0, "proj_type": "std"}],
    engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4},
    costs=COSTS,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
