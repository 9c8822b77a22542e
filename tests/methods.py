"""Every method as the tests run it: one row a method, which all levels of tests read.

The tests iterate over the registry, ``ds_lowrank.methods.METHODS``. A method without a row is run with options that its
model suggests (``Row.of_options``); one without a dense reference fails where it would be compared with it, with a
message that says what to add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_lowrank.methods import METHODS
from ds_lowrank.reference import DENSE, DenseMethod

Shape = tuple[int, int]
Options = dict[str, Any]
Gradients = Callable[[int], torch.Tensor]
"""The gradient of a step, by its number."""

UNDER_ENGINES = {"lr": 1e-2, "eps": 3e-5}
"""Adam's first step divides a gradient by its own magnitude. Near ``eps`` an element passes its rounding error on, here
1e-9 to 1e-8, as that over four ``eps``; and which elements are near it changes with a CPU's kernels. This is well below
the gradients, about 1e-3, and leaves what two orders of summation cannot agree on well below the bounds of the tests.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """How the tests run one method.

    Attributes:
        small: options for matrices of about 12 x 20, with refreshes at steps 0, 3, 6.
        cases: options for the simulated world, refreshes at steps 0, 2, 4: together every option.
        engine: options for real engines on matrices of 40 x 40, 99 x 40 and 40 x 99, refreshes at steps 0, 4, 8.
        costs: options for 48 x 20 whose rank stays fixed, refresh at step 3; None for ``small``.
        fused: options for models with fused weights; None for ``small``.
        grid: two sets of options for matrices that tensor parallelism splits or replicates; None for the first cases.
        multiple: sides of a matrix must be multiples of it in all cases.
        gradients: makes the simulated gradients for a shape; None for standard normal ones.
        starts_from_zero: whether zero weights are as good as any; the difference of two updates is then exact.
        first_step_ignores_size: whether a factor on the gradient leaves the first step alone, as in Adam.
        follows_gradient_rows: whether an update has no direction that the rows of the gradient have not.
        keeps_zeros: whether a weight's rows and columns stay zero where those of every gradient are.
    """

    small: Options
    cases: Sequence[Options]
    engine: Options
    costs: Options | None = None
    fused: Options | None = None
    grid: Sequence[Options] | None = None
    multiple: int = 1
    gradients: Callable[[Shape], Gradients] | None = None
    starts_from_zero: bool = True
    first_step_ignores_size: bool = False
    follows_gradient_rows: bool = False
    keeps_zeros: bool = False

    @classmethod
    def of_options(cls, keys: Mapping[str, Any]) -> Row:
        """The row of a method that has none, from the names of its options."""

        def at(rank: int, gap: int) -> Options:
            return {key: value for key, value in {"rank": rank, "update_proj_gap": gap}.items() if key in keys}

        return cls(small=at(3, 3), cases=[at(4, 2)], engine={**UNDER_ENGINES, **at(4, 4)})

    def fit(self, shape: Shape) -> Shape:
        """A shape that all cases fit: each side, rounded up to a multiple."""
        m, n = (-(-side // self.multiple) * self.multiple for side in shape)
        return m, n

    def cost_options(self, changes: Options) -> Options:
        """The options of ``costs`` with some changes; APOLLO-Mini chooses its own rank."""
        options = self.small if self.costs is None else self.costs
        return {key: value for key, value in options.items() if key != "rank" or not changes.get("mini")} | changes

    @property
    def fused_options(self) -> Options:
        """The options for models with fused weights."""
        return self.small if self.fused is None else self.fused

    @property
    def grid_options(self) -> Sequence[Options]:
        """The options for matrices that tensor parallelism splits or replicates."""
        return self.cases[:2] if self.grid is None else self.grid

    @property
    def shapes(self) -> list[Shape]:
        """A tall, a wide and a square matrix."""
        return [self.fit(shape) for shape in ((17, 9), (9, 17), (12, 12))]

    def gradients_for(self, shape: Shape) -> Gradients:
        """The gradients of the simulated tests; standard normal ones are drawn from torch's global state."""
        return (lambda step: torch.randn(shape)) if self.gradients is None else self.gradients(shape)

    def start(self, shape: Shape) -> torch.Tensor:
        """The weights that a simulated test starts with."""
        return torch.zeros(shape) if self.starts_from_zero else torch.randn(shape)


def paired_spectrum_gradients(shape: Shape) -> Gradients:
    """Gradients whose singular values come in equal pairs, each 0.3 times the pair before, turned in every step.

    AdaRankGrad cuts between pairs: how far a rounding error turns its subspace is one over the gap at the cut.
    """

    def gradient(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        k = min(shape)
        u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in shape)
        return 10 * u * 0.3 ** (torch.arange(k) // 2) @ v.T

    return gradient


GALORE = {"rank": 4, "update_proj_gap": 2}
LORENZA = {"rank": 4, "update_proj_gap": 2}
APOLLO = {"rank": 4, "update_proj_gap": 2}
ADARANKGRAD = {"rank_max": 6, "update_proj_gap": 2, "eps": 1.0}
VLORP = {"rank": 2, "update_proj_gap": 2}
SMALL = {"rank": 3, "update_proj_gap": 3}
COSTS = {"rank": 4, "update_proj_gap": 3}

ROWS = {
    "GaLore": Row(
        small=SMALL,
        cases=[
            GALORE,
            *(GALORE | {"proj_type": side} for side in ("reverse_std", "left", "right")),
            GALORE | {"projector": "svd"},
            GALORE | {"projector": "svd", "proj_type": "reverse_std"},
            GALORE | {"first_basis": "random"},
            GALORE | {"moments": "rotate"},
            GALORE | {"moments": "rotate", "projector": "svd", "proj_type": "left"},
            GALORE | {"weight_decay": 0.1, "scale": 1.0, "betas": (0.8, 0.95)},
            GALORE | {"inner": "adafactor"},
            GALORE | {"inner": "sgd"},
            GALORE | {"inner": "sgd", "momentum": 0.9, "moments": "rotate"},
            GALORE | {"inner": "lion", "moments": "rotate"},
            GALORE | {"inner": "lion", "lion_sign": "original"},
        ],
        grid=[GALORE, GALORE | {"projector": "svd", "moments": "rotate", "proj_type": "reverse_std"}],
        engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4, "scale": 0.25},
        costs=COSTS,
        first_step_ignores_size=True,
        keeps_zeros=True,
        follows_gradient_rows=True,
    ),
    "OnlineSubspaceDescent": Row(
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
        ],
        grid=[{"rank": 4}, {"rank": 4, "inner": "adafactor", "weight_decay": 0.1}],
        engine={**UNDER_ENGINES, "rank": 4, "basis_lr_ratio": 1.0},
        costs={"rank": 4},
        first_step_ignores_size=True,
        keeps_zeros=True,
    ),
    "VLoRP": Row(
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
        ],
        grid=[VLORP | {"granularity": 3}, VLORP | {"granularity": "1/2", "update_scheme": "original_space"}],
        engine={**UNDER_ENGINES, "rank": 2, "granularity": 5, "update_proj_gap": 4},
        costs={"rank": 3, "granularity": 2, "update_proj_gap": 3},
        multiple=6,
        first_step_ignores_size=True,
    ),
    "AdaRankGrad": Row(
        small={"rank_max": 3, "update_proj_gap": 3, "residual_tol": 0.3},
        cases=[
            ADARANKGRAD,
            *(ADARANKGRAD | {"residual_tol": 0.02, "second_moment": rule} for rule in ("abs", "clamp", "squared")),
            ADARANKGRAD | {"rank_multiple": 4},
            ADARANKGRAD | {"rank_min": 4, "never_grow": True},
            ADARANKGRAD | {"grad_norm_tol": 100.0, "update_proj_gap": 50},
            ADARANKGRAD | {"proj_type": "reverse_std"},
            ADARANKGRAD | {"proj_type": "left", "weight_decay": 0.1, "scale": 1.0},
        ],
        engine={**UNDER_ENGINES, "rank_max": 6, "residual_tol": 0.3, "update_proj_gap": 4},
        costs={"rank_max": 4, "rank_min": 4, "update_proj_gap": 3},
        gradients=paired_spectrum_gradients,
        first_step_ignores_size=True,
        keeps_zeros=True,
        follows_gradient_rows=True,
    ),
    "Apollo": Row(
        small=SMALL,
        cases=[
            APOLLO,
            *(APOLLO | {"norm_growth_limit": limit} for limit in (None, 1.0)),
            APOLLO | {"proj_type": "left", "weight_decay": 0.1, "scale": 2.0},
            {"mini": True, "update_proj_gap": 2},
        ],
        grid=[APOLLO, {"mini": True, "update_proj_gap": 2}],
        engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4},
        costs=COSTS,
        first_step_ignores_size=True,
        keeps_zeros=True,
        follows_gradient_rows=True,
    ),
    "GradNormLoRP": Row(
        small=SMALL,
        cases=[
            GALORE,
            GALORE | {"norm_axis": "input"},
            GALORE | {"norm_axis": "input", "proj_type": "reverse_std", "weight_decay": 0.1},
            GALORE | {"norm_axis": "input", "first_basis": "random"},
            GALORE | {"projector": "svd", "moments": "rotate", "scale": 1.0},
            GALORE | {"inner": "adafactor", "weight_decay": 0.1},
            GALORE | {"inner": "lion", "lion_sign": "original", "norm_axis": "input"},
        ],
        grid=[GALORE, GALORE | {"norm_axis": "input", "moments": "rotate"}],
        engine={**UNDER_ENGINES, "rank": 4, "update_proj_gap": 4, "scale": 0.25},
        costs=COSTS,
        starts_from_zero=False,  # a weight of zeros has no direction, and weights are rewritten as a whole
        first_step_ignores_size=True,
        keeps_zeros=True,
    ),
    "Lorenza": Row(
        small=SMALL | {"perturbation_radius": 0.0},
        cases=[
            LORENZA,
            *(LORENZA | {"moment_on_refresh": rule} for rule in ("keep", "reset")),
            *(LORENZA | {"orthogonal_component": True, "orthogonal_scale": s} for s in (1.0, 0.5, "norm_ratio")),
            LORENZA | {"probe_form": "gaussian", "proj_type": "reverse_std", "weight_decay": 0.1, "scale": 0.5},
            {"rank": None},
            {"rank": None, "weight_decay": 0.1, "betas": (0.8, 0.95)},
        ],
        grid=[LORENZA, {"rank": None}],
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
        first_step_ignores_size=True,
        keeps_zeros=True,
        follows_gradient_rows=True,
    ),
}


def of(name: str) -> Row:
    """The row of a registered method, or what its options suggest."""
    return ROWS[name] if name in ROWS else Row.of_options(METHODS[name].Options.model_fields)


def cases() -> list[tuple[str, Options]]:
    """Every registered method with each of its cases."""
    return [(name, options) for name in METHODS for options in of(name).cases]


def dense(name: str) -> Callable[..., DenseMethod]:
    """The dense reference of a method.

    Raises:
        LookupError: it has none; says what to add.
    """
    if name not in DENSE:
        raise LookupError(what_to_add(name))
    return DENSE[name]


def what_to_add(name: str) -> str:
    """What a new method lacks before the tests can compare it."""
    return (
        f"{name} cannot be compared yet. Write its dense reference in ds_lowrank/reference (one process, whole "
        f"matrices, the paper's equations) and add it to DENSE in ds_lowrank/reference/__init__.py. Then give {name} a "
        "row in tests/methods.py, with cases that reach every option"
    )
