"""How the tests run Scale."""

from __future__ import annotations

from tests.rows.row import UNDER_ENGINES, Row

NAME = "Scale"
MOMENTUM = {"momentum": 0.9, "eps": 1e-8}  # the momentum is not corrected for its start: a tenth of the first gradient
ROW = Row(
    small={},
    cases=[
        {},
        MOMENTUM,
        {"normalization": "length", "proj_type": "left", "weight_decay": 0.1},
        MOMENTUM | {"normalization": "length", "scale": 0.5, "weight_decay": 0.1},
        MOMENTUM | {"proj_type": "std"},
        {"proj_type": "reverse_std"},
    ],
    grid=[{}, MOMENTUM | {"proj_type": "left"}],
    engine={**UNDER_ENGINES, "scale": 0.25},
    first_step_ignores_size=True,
    keeps_zeros=True,
    keeps_moments=False,
    follows_gradient_rows=True,
)
