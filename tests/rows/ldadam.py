"""How the tests run LDAdam."""

from __future__ import annotations

from tests.rows.row import UNDER_ENGINES, Row

NAME = "LDAdam"
BETAS = {"betas": (0.908, 0.99)}
"""Its own defaults, said where AdamW on other parameters is compared with a reference that has other ones."""
ROW = Row(
    small={"rank": 3, **BETAS},
    cases=[
        {"rank": 4},
        {"rank": 4, "error_feedback": True},
        {"rank": 4, "projector": "svd", "proj_type": "reverse_std"},
        {"rank": 4, "error_feedback": True, "proj_type": "left", "weight_decay": 0.1, "scale": 0.5},
        {"rank": 4, "rho": 0.5, "betas": (0.8, 0.95)},
    ],
    grid=[{"rank": 4}, {"rank": 4, "error_feedback": True}],
    engine={**UNDER_ENGINES, **BETAS, "rank": 4, "error_feedback": True},
    costs={"rank": 4},
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
