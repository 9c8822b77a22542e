"""How the tests run Flora."""

from __future__ import annotations

from tests.rows.row import UNDER_ENGINES, Row

NAME = "Flora"
CASE = {"rank": 4, "kappa": 2}
ROW = Row(
    small={"rank": 3, "kappa": 3},
    cases=[
        CASE,
        CASE | {"newest_term": "projected", "proj_type": "left"},
        CASE | {"second_moment": "none"},
        CASE | {"second_moment": "none", "newest_term": "projected", "scale_parameter": False},
        CASE | {"scale_parameter": False, "weight_decay": 0.1, "betas": (0.8, 0.95)},
        CASE | {"proj_type": "reverse_std"},
    ],
    grid=[CASE, CASE | {"newest_term": "projected", "second_moment": "none"}],
    engine={**UNDER_ENGINES, "rank": 4, "kappa": 4},
    costs={"rank": 4, "kappa": 3},
    starts_from_zero=False,  # a step is as large as the weights
)
