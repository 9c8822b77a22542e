"""How the tests run OnlineSubspaceDescent."""

from __future__ import annotations

from tests.rows.row import UNDER_ENGINES, Row

NAME = "OnlineSubspaceDescent"
ROW = Row(
    small={"rank": 3, "basis_lr_ratio": 1.0},
    cases=[
        {"rank": 4},
        *({"rank": 4, "basis_init": init} for init in ("svd", "random")),
        *({"rank": 4, "basis_optimizer": rule} for rule in ("sgd", "lion", "adafactor")),
        *({"rank": 4, "inner": rule} for rule in ("sgd", "lion", "adafactor")),
        {"rank": 4, "inner": "lion", "lion_sign": "original", "basis_optimizer": "lion"},
        {"rank": 4, "inner": "sgd", "momentum": 0.9, "basis_optimizer": "sgd", "basis_lr_ratio": 20.0},
        {"rank": 4, "pca_lambda": 0.0, "proj_type": "reverse_std"},
        {"rank": 4, "pca_norm": "projected", "basis_optimizer": "sgd"},
        {"rank": 4, "weight_decay": 0.1, "scale": 1.0},
        {"rank": 4, "weight_decay": 0.1, "basis_weight_decay": 0.3},
        {"rank": 4, "basis_optimizer": "lion", "basis_betas": (0.5, 0.8)},
        {"rank": 4, "basis_betas": (0.5, 0.8), "basis_init": "svd"},
        {"rank": 4, "basis_optimizer": "random", "update_proj_gap": 2},
    ],
    grid=[{"rank": 4}, {"rank": 4, "inner": "adafactor", "weight_decay": 0.1}],
    engine={**UNDER_ENGINES, "rank": 4, "basis_lr_ratio": 1.0},
    costs={"rank": 4},
    first_step_ignores_size=True,
    keeps_zeros=True,
)
