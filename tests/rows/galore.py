"""How the tests run GaLore."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row

NAME = "GaLore"
ROW = Row(
    small=SMALL,
    cases=[
        CASE,
        *(CASE | {"proj_type": side} for side in ("reverse_std", "left", "right")),
        CASE | {"projector": "svd"},
        CASE | {"projector": "svd", "proj_type": "reverse_std"},
        CASE | {"first_basis": "random"},
        CASE | {"projector": "random"},
        CASE | {"projector": "random", "moments": "rotate", "proj_type": "left"},
        CASE | {"projector": "sampled", "moments": "rotate"},
        CASE | {"projector": "dct"},
        CASE | {"projector": "dct", "moments": "rotate", "proj_type": "reverse_std"},
        *(CASE | {"power_steps": steps} for steps in (0, 3)),
        CASE | {"moments": "rotate"},
        CASE | {"moments": "rotate", "projector": "svd", "proj_type": "left"},
        CASE | {"weight_decay": 0.1, "scale": 1.0, "betas": (0.8, 0.95)},
        CASE | {"weight_decay": 0.1, "weight_decay_order": "after", "eps_root": "uncorrected", "eps": 0.1},
        CASE | {"cos_threshold": 0.05, "queue_size": 1, "gamma_proj": 3, "moments": "rotate", "update_proj_gap": 1},
        CASE | {"inner": "adafactor"},
        CASE | {"inner": "sgd"},
        CASE | {"inner": "sgd", "momentum": 0.9, "moments": "rotate"},
        CASE | {"inner": "lion", "moments": "rotate"},
        CASE | {"inner": "lion", "lion_sign": "original"},
    ],
    grid=[CASE, CASE | {"projector": "svd", "moments": "rotate", "proj_type": "reverse_std"}],
    engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4, "scale": 0.25},
    costs=COSTS,
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
