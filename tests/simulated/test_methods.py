"""Every method, every option, on every layout of the simulated world, against its dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.methods import METHODS
from ds_lowrank.methods.blocks.granularity import divisors
from ds_lowrank.optimizer.step import step_matrices
from ds_lowrank.reference import DENSE
from ds_lowrank.reference.galore import sketch
from ds_lowrank.sharding.world import SimulatedWorld
from tests.simulated.harness import (
    ShardedMatrix,
    compare,
    even_parts,
    flat_parts,
    relative_error,
    state_elements,
    tensor_parallel_parts,
)

GALORE = {"rank": 4, "update_proj_gap": 2}
ADARANKGRAD = {"rank_max": 6, "update_proj_gap": 2, "eps": 1.0}
APOLLO = {"rank": 4, "update_proj_gap": 2}
LORENZA = {"rank": 4, "update_proj_gap": 2}
VLORP = {"rank": 2, "update_proj_gap": 2}

CASES = {
    "GaLore": [
        GALORE,
        *(GALORE | {"proj_type": side} for side in ("reverse_std", "left", "right")),
        GALORE | {"projector": "svd"},
        GALORE | {"projector": "svd", "proj_type": "reverse_std"},
        GALORE | {"moments": "rotate"},
        GALORE | {"moments": "rotate", "projector": "svd", "proj_type": "left"},
        GALORE | {"weight_decay": 0.1, "scale": 1.0, "betas": (0.8, 0.95)},
        GALORE | {"inner": "adafactor"},
        GALORE | {"inner": "sgd"},
        GALORE | {"inner": "sgd", "momentum": 0.9, "moments": "rotate"},
        GALORE | {"inner": "lion", "moments": "rotate"},
        GALORE | {"inner": "lion", "lion_sign": "original"},
    ],
    "OnlineSubspaceDescent": [
        {"rank": 4},
        *({"rank": 4, "basis_init": init} for init in ("svd", "random")),
        *({"rank": 4, "basis_optimizer": rule} for rule in ("sgd", "lion", "adafactor")),
        *({"rank": 4, "inner": rule} for rule in ("sgd", "lion", "adafactor")),
        {"rank": 4, "inner": "lion", "lion_sign": "original", "basis_optimizer": "lion"},
        {"rank": 4, "inner": "sgd", "momentum": 0.9, "basis_optimizer": "sgd", "basis_lr_ratio": 20.0},
        {"rank": 4, "pca_lambda": 0.0, "proj_type": "reverse_std"},
        {"rank": 4, "weight_decay": 0.1, "scale": 1.0},
        {"rank": 4, "weight_decay": 0.1, "basis_weight_decay": 0.3},
    ],
    "VLoRP": [
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
    "AdaRankGrad": [
        ADARANKGRAD,
        *(ADARANKGRAD | {"residual_tol": 0.02, "second_moment": rule} for rule in ("abs", "clamp", "squared")),
        ADARANKGRAD | {"rank_multiple": 4},
        ADARANKGRAD | {"rank_min": 4, "never_grow": True},
        ADARANKGRAD | {"grad_norm_tol": 100.0, "update_proj_gap": 50},
        ADARANKGRAD | {"proj_type": "reverse_std"},
        ADARANKGRAD | {"proj_type": "left", "weight_decay": 0.1, "scale": 1.0},
    ],
    "Apollo": [
        APOLLO,
        *(APOLLO | {"norm_growth_limit": limit} for limit in (None, 1.0)),
        APOLLO | {"proj_type": "left", "weight_decay": 0.1, "scale": 2.0},
        {"mini": True, "update_proj_gap": 2},
    ],
    "GradNormLoRP": [
        GALORE,
        GALORE | {"norm_axis": "input"},
        GALORE | {"norm_axis": "input", "proj_type": "reverse_std", "weight_decay": 0.1},
        GALORE | {"projector": "svd", "moments": "rotate", "scale": 1.0},
        GALORE | {"inner": "adafactor", "weight_decay": 0.1},
        GALORE | {"inner": "lion", "lion_sign": "original", "norm_axis": "input"},
    ],
    "Lorenza": [
        LORENZA,
        *(LORENZA | {"moment_on_refresh": rule} for rule in ("keep", "reset")),
        *(LORENZA | {"orthogonal_component": True, "orthogonal_scale": s} for s in (1.0, 0.5, "norm_ratio")),
        LORENZA | {"probe_form": "gaussian", "proj_type": "reverse_std", "weight_decay": 0.1, "scale": 0.5},
        {"rank": None},
        {"rank": None, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    ],
}
OFFICIAL_VIEW = [
    VLORP | {"granularity": c, "left_view": "official", "update_scheme": scheme}
    for c in (3, "1/2")
    for scheme in ("projfactor", "subspace", "original_space")
]
EVERY = [(method, options) for method, cases in CASES.items() for options in cases]
SHAPES = {"VLoRP": [(18, 12), (12, 18), (12, 12)]}


def stairs(shape):
    """Gradients whose singular values come in equal pairs, each pair 0.3 times the one before, turned every step.

    AdaRankGrad cuts between pairs: how far a rounding error turns its subspace is one over the gap at the cut.
    """

    def gradient(step):
        generator = torch.Generator().manual_seed(step)
        k = min(shape)
        u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in shape)
        return 10 * u * 0.3 ** (torch.arange(k) // 2) @ v.T

    return gradient


def gradients_for(method, shape):
    return stairs(shape) if method == "AdaRankGrad" else None


def test_every_method_is_tested():
    assert CASES.keys() == METHODS.keys() == DENSE.keys()


@pytest.mark.parametrize(("method", "options"), EVERY, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_option_on_every_world(ranks, method, options):
    for shape in SHAPES.get(method, [(17, 9), (9, 17), (12, 12)]):
        compare(method, shape, even_parts(shape, ranks), gradients=gradients_for(method, shape), **options)


@pytest.mark.parametrize(("method", "options"), EVERY, ids=str)
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_tensor_parallel_blocks_further_split_by_data_ranks(split, method, options):
    shape = (18, 24) if method == "VLoRP" else (14, 22)
    parts = tensor_parallel_parts(shape, split)
    compare(method, shape, parts, gradients=gradients_for(method, shape), **options)


@pytest.mark.parametrize("options", OFFICIAL_VIEW, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_official_view_of_wide_matrices(ranks, options):
    for shape in [(12, 18), (18, 12)]:
        compare("VLoRP", shape, even_parts(shape, ranks), **options)


@pytest.mark.parametrize(("method", "options"), EVERY, ids=str)
def test_ranks_without_a_part_and_parts_of_one_element(method, options):
    shape = (18, 12) if method == "VLoRP" else (17, 9)
    cuts = [0, 40, 40, 41, shape[0] * shape[1]]
    compare(method, shape, flat_parts(shape, cuts), gradients=gradients_for(method, shape), **options)


@pytest.mark.parametrize(("method", "options"), EVERY, ids=str)
def test_moments_of_eight_bits_are_the_same_on_every_world(method, options):
    """Blocks of 64 rows stay whole wherever a rank's share ends, and rounding is a function of row, column and step.

    Where two layouts' sums differ in the last bit, a number that lies on the boundary of its rounding may go either
    way: hardly more than one of the some hundred here, and that by a tenth.
    """
    shape = (144, 72) if method == "VLoRP" else (150, 70)
    for turned in (shape, shape[::-1]):
        gradients = gradients_for(method, turned)
        dense, one, three = worlds_of_eight_bits(method, turned, options)
        for step in range(4):
            torch.manual_seed(100 + step)
            gradient = torch.randn(turned) if gradients is None else gradients(step)
            for matrix in (dense, one, three):
                matrix.step(gradient)
            if step == 0:  # nothing was rounded before; VLoRP is at 1.1e-6
                assert (one.weight - dense.weight).norm() < 2e-6 * dense.weight.norm()
            assert (one.weight - three.weight).norm() < 1e-3 * one.weight.norm()


def worlds_of_eight_bits(method, shape, options):
    torch.manual_seed(0)
    options = {"lr": 1e-2, "eps": 0.1, **options}
    start = torch.randn(shape) if method == "GradNormLoRP" else torch.zeros(shape)
    worlds = [
        ShardedMatrix(method, start.clone(), even_parts(shape, ranks), state_dtype="int8", **options)
        for ranks in (1, 3)
    ]
    return DENSE[method](start.clone(), **options), *worlds


def random_layout(data):
    shape = data.draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    ranks = data.draw(st.integers(1, 6))
    cuts = data.draw(st.lists(st.integers(0, shape[0] * shape[1]), min_size=ranks - 1, max_size=ranks - 1))
    return shape, flat_parts(shape, cuts)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_any_cut_and_any_granularity(data):
    """Sums and products, then a root that an epsilon of 0.1 keeps away from zero: ten times some roundings.

    Of 2500 random cases the worst stayed at a quarter of the bound.
    """
    shape, parts = random_layout(data)
    kept, compressed = max(shape), min(shape)
    c = f"{data.draw(st.sampled_from(divisors(compressed)))}/{data.draw(st.sampled_from(divisors(kept)))}"
    scheme = data.draw(st.sampled_from(["projfactor", "subspace", "original_space"]))
    view = data.draw(st.sampled_from(["transpose", "official"]))
    rank = data.draw(st.integers(1, 5))
    options = {"granularity": c, "rank": rank, "update_scheme": scheme, "left_view": view, "update_proj_gap": 2}
    compare("VLoRP", shape, parts, bound=1e-5, **options)


def apollo_bound(shape, rank, steps=4, gap=2):
    """Four roundings of fp32, times how far a row's norm cancels in its projection, at least 2e-6.

    Apollo divides by the norm of the projected row. Of 2500 random cases the worst stayed at a tenth of it.
    """
    torch.manual_seed(0)
    cancelled = 1.0
    for step in range(steps):
        gradient = torch.randn(shape)
        turned = gradient if shape[0] >= shape[1] else gradient.T
        projection = sketch(0, "w", step // gap, turned.shape[1], min(rank, *shape))
        norms = turned.norm(dim=1) * projection.norm() / (turned @ projection).norm(dim=1)
        cancelled = max(cancelled, norms.max().item())
    return max(2e-6, 4 * torch.finfo(torch.float32).eps * cancelled)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_and_any_cut_of_apollo(data):
    shape, parts = random_layout(data)
    rank = data.draw(st.integers(1, 6))
    compare("Apollo", shape, parts, bound=apollo_bound(shape, rank), rank=rank, update_proj_gap=2)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape_and_any_cut_of_online_subspace_descent(data):
    """From a random basis nothing is factored. Of 2500 random cases the worst was 9e-7."""
    shape, parts = random_layout(data)
    rank = data.draw(st.integers(1, 6))
    options = {"rank": rank, "basis_init": "random", "basis_lr_ratio": 1.0}
    compare("OnlineSubspaceDescent", shape, parts, bound=3e-6, **options)


@pytest.mark.parametrize("method", sorted(CASES))
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_rows_and_columns_of_zeros_are_no_source_of_noise(shape, method):
    """Rounding noise in their place, other noise on every layout, would be blown up by Adam at its usual epsilon.

    At that epsilon a rounding of 1e-7 in an element of a thousandth of its neighbours' size is one of 1e-4.
    """
    options = CASES[method][0] | {"lr": 1e-2, "eps": 1e-8}
    one, three = (ShardedMatrix(method, torch.zeros(shape), even_parts(shape, ranks), **options) for ranks in (1, 3))
    for step in range(6):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        gradient[[2, 5, 6]] = 0
        gradient[:, [1, 7]] = 0
        one.step(gradient)
        three.step(gradient)
    assert (one.weight - three.weight).norm() < 1e-4 * one.weight.norm()
    if method != "VLoRP":  # which lifts a random projection into dead places too
        assert one.weight[[2, 5, 6]].abs().max() == one.weight[:, [1, 7]].abs().max() == 0


STATE = [
    ("GaLore", {"rank": 4}, lambda kept, compressed: 4 * (2 * kept + compressed)),
    ("GaLore", {"rank": 4, "inner": "lion"}, lambda kept, compressed: 4 * (kept + compressed)),
    ("GaLore", {"rank": 4, "inner": "sgd"}, lambda kept, compressed: 4 * compressed),
    ("GaLore", {"rank": 4, "inner": "sgd", "momentum": 0.9}, lambda kept, compressed: 4 * (kept + compressed)),
    ("GaLore", {"rank": 4, "inner": "adafactor"}, lambda kept, compressed: 4 * compressed + kept + 4),
    ("OnlineSubspaceDescent", {"rank": 4}, lambda kept, compressed: 4 * (2 * kept + compressed) + 2 * 4 * compressed),
    (
        "OnlineSubspaceDescent",
        {"rank": 4, "basis_optimizer": "sgd"},
        lambda kept, compressed: 4 * (2 * kept + compressed),
    ),
    (
        "OnlineSubspaceDescent",
        {"rank": 4, "basis_optimizer": "lion"},
        lambda kept, compressed: 4 * (2 * kept + compressed) + 4 * compressed,
    ),
    (
        "OnlineSubspaceDescent",
        {"rank": 4, "basis_optimizer": "adafactor"},
        lambda kept, compressed: 4 * (2 * kept + compressed) + 4 + compressed,
    ),
    ("VLoRP", {"rank": 4, "granularity": 5}, lambda kept, compressed: 5 * 4 * kept + kept + compressed),
    ("VLoRP", {"rank": 4, "granularity": "1/5"}, lambda kept, compressed: 4 * kept // 5 + kept + compressed),
    (
        "VLoRP",
        {"rank": 4, "granularity": 5, "update_scheme": "subspace"},
        lambda kept, compressed: 2 * 5 * 4 * kept,
    ),
    (
        "VLoRP",
        {"rank": 4, "granularity": 5, "update_scheme": "original_space"},
        lambda kept, compressed: 2 * kept * compressed,
    ),
    ("AdaRankGrad", {"rank_max": 4, "rank_min": 4}, lambda kept, compressed: 4 * (2 * kept + compressed)),
    ("Apollo", {"rank": 4}, lambda kept, compressed: 2 * 4 * kept + 1),
    ("Apollo", {"mini": True}, lambda kept, compressed: 2 * kept + 1),
]


@pytest.mark.parametrize(
    ("method", "options", "formula"), STATE, ids=lambda value: "" if callable(value) else str(value)
)
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_state_over_all_ranks_is_the_published_formula(shape, method, options, formula):
    """Elements, on any number of ranks; a projection that a seed gives back is not among them."""
    for ranks in (1, 2, 3, 7):
        sharded = ShardedMatrix(method, torch.zeros(shape), even_parts(shape, ranks), **options)
        for step in range(2):
            assert state_elements(sharded) == formula(30, 20)
            assert sharded.state_stores[0].numel == formula(30, 20)
            torch.manual_seed(step)
            sharded.step(torch.randn(shape))


def test_adarankgrad_shrinks_its_state_with_its_rank():
    shape = (30, 20)
    sharded = ShardedMatrix("AdaRankGrad", torch.zeros(shape), even_parts(shape, 3), rank_max=8, update_proj_gap=2)
    assert state_elements(sharded) == 8 * (2 * 30 + 20)
    ranks = []
    for width in (6, 6, 3, 3, 5, 5):
        torch.manual_seed(width)
        sharded.step(torch.linalg.qr(torch.randn(30, width)).Q @ torch.randn(width, 20).sign())
        (rank,) = {state["rank"] for state in sharded.states}
        assert state_elements(sharded) == rank * (2 * 30 + 20)
        ranks.append(rank)
    assert ranks[2] == ranks[3] < ranks[0] == ranks[1]
    assert ranks[4] == ranks[5] > ranks[3]


@pytest.mark.parametrize(("method", "options"), [(m, cases[0]) for m, cases in CASES.items()], ids=str)
def test_rounds_do_not_grow_with_the_number_of_matrices(method, options):
    counts = []
    for matrices in (1, 9):
        many = [
            ShardedMatrix(method, torch.zeros(12, 8), flat_parts((12, 8), [31, 50]), name=f"w{i}", **options)
            for i in range(matrices)
        ]
        rounds = []
        for step in range(2):
            world = SimulatedWorld(3)
            torch.manual_seed(step)
            for one in many:
                one.attach(torch.randn(12, 8))
            world.run([step_matrices(METHODS[method], [one.in_step(k) for one in many], 3) for k in range(3)])
            rounds.append(world.rounds)
        counts.append(rounds)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("method", "options"), EVERY, ids=str)
def test_a_later_gradient_of_zeros_keeps_everything_finite(method, options):
    """Also where a refresh is due (step 2), and for parts that are empty.

    Methods that read a subspace off the gradient at fixed steps then keep the old one, where the paper would take the
    singular vectors of zero: tests/contract has that.
    """
    shape = (18, 12) if method == "VLoRP" else (17, 9)
    choose = gradients_for(method, shape) or (lambda step: torch.randn(shape))
    error, sharded = relative_error(
        method,
        shape,
        flat_parts(shape, [0, 50]),
        steps=5,
        gradients=lambda step: torch.zeros(shape) if step == 2 else choose(step),
        **options,
    )
    assert sharded.weight.isfinite().all()
    if "basis" not in sharded.states[0] or method in ("AdaRankGrad", "OnlineSubspaceDescent"):
        assert error < 1e-6
