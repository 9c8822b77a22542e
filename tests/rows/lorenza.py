"""How the tests run Lorenza."""

from __future__ import annotations

from tests.rows.row import CASE, COSTS, SMALL, UNDER_ENGINES, Row, gradients_with

NAME = "Lorenza"
ROW = Row(
    small=SMALL | {"perturbation_radius": 0.0},
    cases=[
        CASE,
        *(CASE | {"moment_on_refresh": rule} for rule in ("keep", "reset")),
        CASE | {"power_steps": 2},
        *(CASE | {"orthogonal_component": True, "orthogonal_scale": s} for s in (1.0, 0.5, "norm_ratio")),
        *(CASE | {"right_factor": "svd", "moment_on_refresh": rule} for rule in ("rotate", "keep")),
        CASE | {"probe_form": "gaussian", "proj_type": "reverse_std", "weight_decay": 0.1, "scale": 0.5},
        {"rank": None},
        {"rank": None, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    ],
    grid=[CASE, {"rank": None}],
    engine={
        **UNDER_ENGINES,
        "rank": 4,
        "update_proj_gap": 4,
        "probes": 2,
        "probe_radius": 1.0,  # a slope is a difference of losses, and the larger it is the more digits it has
        "perturbation_radius": 0.5,
    },
    costs=COSTS,
    fused=SMALL | {"probes": 2, "probe_radius": 1.0, "perturbation_radius": 0.5},
    gradients=gradients_with(lambda k: 0.7**k),  # singular vectors in pairs need values that differ
    first_step_ignores_size=True,
    keeps_zeros=True,
    follows_gradient_rows=True,
)
