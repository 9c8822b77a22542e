"""How the tests run Frugal."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row

NAME = "Frugal"
ROW = Row(
    small=SMALL,
    cases=[
        CASE,
        CASE | {"projector": "columns"},
        CASE | {"projector": "columns", "proj_type": "left", "moments": "keep", "state_free_lr_scale": 0.1},
        CASE | {"projector": "random", "moments": "rotate", "weight_decay": 0.1, "scale": 0.5},
        CASE | {"projector": "svd", "state_free": "sgd", "proj_type": "reverse_std"},
        CASE | {"inner": "adafactor", "first_basis": "random"},
        CASE | {"inner": "sgd", "momentum": 0.9},
        {"rank": 40, "update_proj_gap": 2},
    ],
    grid=[CASE, CASE | {"projector": "columns", "state_free": "sgd"}],
    engine={
        **UNDER_ENGINES,
        "rank": 4,
        "update_proj_gap": 4,
        "state_free_lr_scale": 1e-3,  # two orders of summation may differ in the sign of an element near zero
    },
    costs=COSTS,
    first_step_ignores_size=True,
    keeps_zeros=True,
)
