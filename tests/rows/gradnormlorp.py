"""How the tests run GradNormLoRP."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row

NAME = "GradNormLoRP"
ROW = Row(
    small=SMALL,
    cases=[
        CASE,
        CASE | {"norm_axis": "input"},
        CASE | {"norm_axis": "input", "proj_type": "reverse_std", "weight_decay": 0.1},
        CASE | {"norm_axis": "input", "first_basis": "random"},
        CASE | {"projector": "svd", "moments": "rotate", "scale": 1.0},
        CASE | {"projector": "random", "norm_axis": "input"},
        CASE | {"projector": "dct", "norm_axis": "input"},
        CASE | {"inner": "adafactor", "weight_decay": 0.1},
        CASE | {"weight_decay": 0.1, "weight_decay_order": "after", "eps_root": "uncorrected", "eps": 0.1},
        CASE | {"inner": "lion", "lion_sign": "original", "norm_axis": "input"},
    ],
    grid=[CASE, CASE | {"norm_axis": "input", "moments": "rotate"}],
    engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4, "scale": 0.25},
    costs=COSTS,
    starts_from_zero=False,  # a weight of zeros has no direction, and weights are rewritten as a whole
    first_step_ignores_size=True,
    keeps_zeros=True,
)
