"""How the tests run SubTrack."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row

NAME = "SubTrack"
TURNING = CASE | {"step_size": 1e-3}
"""An angle of about a tenth where gradients are standard normal."""
ROW = Row(
    small=SMALL,
    cases=[
        TURNING,
        CASE,
        TURNING | {"projector": "svd", "proj_type": "reverse_std", "norm_growth_limit": None},
        TURNING | {"projection_aware": False, "proj_type": "left", "weight_decay": 0.1, "scale": 0.5},
        TURNING | {"recovery_scaling": False, "betas": (0.8, 0.95)},
    ],
    grid=[TURNING, TURNING | {"projector": "svd", "recovery_scaling": False}],
    engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4, "step_size": 1e3},
    costs=COSTS,
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
