"""How the tests run Gum."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row

NAME = "Gum"
# Of two periods, the matrix "w" is stepped whole in the second with seed 5, in the first with seed 2.
WHOLE = {"full_share": 1.0}
SOME_WHOLE = {"full_share": 0.5}
ROW = Row(
    small=SMALL | SOME_WHOLE,
    cases=[
        CASE | {"full_share": 0.0, "adjust_lr_fn": "original", "proj_type": "reverse_std"},
        CASE | SOME_WHOLE | {"seed": 5},
        CASE | SOME_WHOLE | {"seed": 2, "projector": "svd", "nesterov": True},
        CASE | SOME_WHOLE | {"seed": 2, "orthogonalization": "exact", "proj_type": "reverse_std"},
        CASE | SOME_WHOLE | {"seed": 5, "orthogonalization": "exact", "weight_decay": 0.1, "scale": 0.5},
        WHOLE | {"nesterov": True, "adjust_lr_fn": "match_rms_adamw"},
        WHOLE | {"orthogonalization": "exact", "proj_type": "reverse_std"},
    ],
    grid=[CASE | SOME_WHOLE, WHOLE],
    engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4, "full_share": 0.5},
    costs=COSTS | {"full_share": 0.0},
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
