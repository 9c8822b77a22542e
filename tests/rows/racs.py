"""How the tests run Racs."""

from __future__ import annotations

from tests.rows.row import UNDER_ENGINES, Row

NAME = "Racs"
ROW = Row(
    small={},
    cases=[
        {},
        *({"norm_growth_limit": limit} for limit in (None, 1.0)),
        {"proj_type": "reverse_std", "weight_decay": 0.1},
        {"iterations": 1, "scale": 1.0},
        {"beta": 0.0, "iterations": 2, "proj_type": "left"},
    ],
    grid=[{}, {"proj_type": "left", "norm_growth_limit": None}],
    engine=UNDER_ENGINES,
    first_step_ignores_size=True,
    keeps_zeros=True,
    keeps_moments=False,
)
