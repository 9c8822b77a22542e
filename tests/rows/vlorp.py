"""How the tests run VLoRP."""

from __future__ import annotations

from tests.rows.row import SMALL, UNDER_ENGINES, Row

NAME = "VLoRP"
VLORP = {"rank": 2, "update_proj_gap": 2}
ROW = Row(
    small=SMALL | {"granularity": 1},
    cases=[
        *(VLORP | {"granularity": c} for c in (1, 3, 6, 0.5, "1/6", "2/3", 1.5)),
        *(VLORP | {"granularity": c, "update_scheme": "subspace"} for c in (3, "1/2", "3/2")),
        *(VLORP | {"granularity": c, "update_scheme": "original_space"} for c in (3, "1/2")),
        VLORP | {"granularity": 3, "distribution": "rademacher"},
        VLORP | {"granularity": 3, "moment_on_resample": "reset"},
        VLORP | {"granularity": 3, "moment_on_resample": "reset", "update_scheme": "subspace"},
        VLORP | {"granularity": "1/2", "moment_on_resample": "reproject"},
        VLORP | {"granularity": 3, "moment_on_resample": "reproject", "update_scheme": "subspace"},
        VLORP | {"granularity": 3, "eps_position": "inside"},
        VLORP | {"granularity": 3, "bias_correction": "linear"},
        VLORP | {"granularity": 3, "proj_type": "reverse_std", "weight_decay": 0.1},
        *(VLORP | {"granularity": c, "scale": 0.25} for c in (3, "1/2")),
        VLORP | {"granularity": 3, "scale": 0.25, "update_scheme": "subspace"},
        VLORP | {"granularity": 3, "scale": 0.25, "update_scheme": "original_space"},
        *(VLORP | {"granularity": c, "scale": s, "update_scheme": "sgd"} for c, s in ((3, 1.0), ("1/2", 0.25))),
    ],
    grid=[VLORP | {"granularity": 3}, VLORP | {"granularity": "1/2", "update_scheme": "original_space"}],
    engine={**UNDER_ENGINES, "rank": 2, "granularity": 5, "update_proj_gap": 4},
    costs={"rank": 3, "granularity": 2, "update_proj_gap": 3},
    multiple=6,
    first_step_ignores_size=True,
)
