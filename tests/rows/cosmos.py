"""How the tests run Cosmos."""

from __future__ import annotations

from tests.rows.row import UNDER_ENGINES, Row

NAME = "Cosmos"
BETAS = {"betas": (0.95, 0.95)}
"""Its own defaults, said where AdamW on other parameters is compared with a reference that has other ones."""
KEEPS_SMALLER = {"proj_type": "reverse_std", "gamma": 0.02}
"""What the subspace leaves of a momentum has fewer directions than rows then. NS enlarges the rounding in the others:
at the usual gamma two layouts differ by 5e-6."""
ROW = Row(
    small={"rank": 3, **BETAS},
    cases=[
        {"rank": 4},
        {"rank": 4, "nesterov": False, "beta3": 0.8, "betas": (0.9, 0.99), "gamma": 1.0},
        {"rank": 4, "projector": "svd", **KEEPS_SMALLER},
        {"rank": 3, "weight_decay": 0.1, "scale": 0.5, **KEEPS_SMALLER, "proj_type": "left"},
        {"rank": 12, "gamma": 0.0},
    ],
    grid=[{"rank": 4}, {"rank": 4, "nesterov": False, "beta3": 0.5}],
    engine={**UNDER_ENGINES, **BETAS, "rank": 4},
    costs={"rank": 4},
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
