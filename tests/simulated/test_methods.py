"""Every method, every option, on every layout of the simulated world, against its dense reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.methods import METHODS
from ds_lowrank.methods.blocks.granularity import divisors
from ds_lowrank.optimizer.step import step_matrices
from ds_lowrank.reference import DenseLorenza
from ds_lowrank.reference.sketch import sketch
from ds_lowrank.sharding.world import SimulatedWorld
from tests.methods import cases, dense, of
from tests.rows.vlorp import VLORP
from tests.simulated.harness import (
    ROUNDING,
    ShardedMatrix,
    assert_matches_reference,
    even_parts,
    flat_parts,
    state_elements,
    tensor_parallel_parts,
)

EVERY = cases()
ALL_CASES = pytest.mark.parametrize(("method", "options"), EVERY, ids=str)
OFFICIAL_VIEW = [
    VLORP | {"granularity": c, "left_view": "official", "update_scheme": scheme}
    for c in (3, "1/2")
    for scheme in ("projfactor", "subspace", "original_space")
]


@ALL_CASES
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_option_matches_reference(ranks, method, options):
    """On 1, 2 and 3 ranks a tall, a wide and a square matrix; on 5 the tall one."""
    shapes = of(method).shapes
    for shape in shapes if ranks < 5 else shapes[:1]:
        assert_matches_reference(method, shape, even_parts(shape, ranks), **options)


@ALL_CASES
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_tensor_parallel_blocks_cut_by_data_ranks_match_reference(split, method, options):
    shape = of(method).fit((14, 22))
    assert_matches_reference(method, shape, tensor_parallel_parts(shape, split), **options)


@pytest.mark.parametrize("options", OFFICIAL_VIEW, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_official_view_of_vlorp_matches_reference(ranks, options):
    for shape in [(12, 18), (18, 12)]:
        assert_matches_reference("VLoRP", shape, even_parts(shape, ranks), **options)


@ALL_CASES
def test_empty_parts_and_parts_of_one_element_match_reference(method, options):
    shape = of(method).shapes[0]
    cuts = [0, 40, 40, 41, shape[0] * shape[1]]
    assert_matches_reference(method, shape, flat_parts(shape, cuts), **options)


@ALL_CASES
def test_int8_moments_are_equal_on_every_world(method, options):
    """Blocks of 64 rows stay whole wherever a rank's share ends, and rounding is a function of row, column and step.

    Where the sums of two layouts differ in the last bit, a number on the boundary of its rounding may go either way:
    hardly more than one of a few hundred here, and that by a tenth.
    """
    row = of(method)
    shape = row.fit((150, 70))
    for turned in (shape, shape[::-1]):
        reference, one, three = int8_worlds(method, turned, options)
        gradients = row.gradients_for(turned)
        for step in range(4):
            torch.manual_seed(100 + step)
            gradient = gradients(step)
            for matrix in (reference, one, three):
                matrix.step(gradient)
            if step == 0:  # nothing was rounded before
                assert (one.weight - reference.weight).norm() < ROUNDING * reference.weight.norm()
            assert (one.weight - three.weight).norm() < 1e-3 * one.weight.norm()


def int8_worlds(method, shape, options):
    """The dense reference, and the matrix on one and on three ranks with moments in int8."""
    torch.manual_seed(0)
    options = {"lr": 1e-2, "eps": 0.1, **options}
    start = of(method).start(shape)
    worlds = [
        ShardedMatrix(method, start.clone(), even_parts(shape, ranks), state_dtype="int8", **options)
        for ranks in (1, 3)
    ]
    return dense(method)(start.clone(), **options), *worlds


def random_layout(data):
    shape = data.draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    ranks = data.draw(st.integers(1, 6))
    cuts = data.draw(st.lists(st.integers(0, shape[0] * shape[1]), min_size=ranks - 1, max_size=ranks - 1))
    return shape, flat_parts(shape, cuts)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cut_and_granularity_of_vlorp_match_reference(data):
    """Sums and products, then a root that an epsilon of 0.1 keeps away from zero: ten times some roundings.

    The largest error of 2500 random cases was a quarter of the bound.
    """
    shape, parts = random_layout(data)
    kept, compressed = max(shape), min(shape)
    c = f"{data.draw(st.sampled_from(divisors(compressed)))}/{data.draw(st.sampled_from(divisors(kept)))}"
    scheme = data.draw(st.sampled_from(["projfactor", "subspace", "original_space"]))
    view = data.draw(st.sampled_from(["transpose", "official"]))
    rank = data.draw(st.integers(1, 5))
    options = {"granularity": c, "rank": rank, "update_scheme": scheme, "left_view": view, "update_proj_gap": 2}
    assert_matches_reference("VLoRP", shape, parts, bound=1e-5, **options)


def apollo_bound(shape, rank, steps=4, gap=2):
    """Four roundings of fp32, times how far a row's norm cancels in its projection, at least ``ROUNDING``.

    Apollo divides by the norm of the projected row. The largest error of 2500 random cases was a tenth of the bound.
    """
    torch.manual_seed(0)
    cancelled = 1.0
    for step in range(steps):
        gradient = torch.randn(shape)
        turned = gradient if shape[0] >= shape[1] else gradient.T
        projection = sketch(0, "w", step // gap, turned.shape[1], min(rank, *shape))
        norms = turned.norm(dim=1) * projection.norm() / (turned @ projection).norm(dim=1)
        cancelled = max(cancelled, norms.max().item())
    return max(ROUNDING, 4 * torch.finfo(torch.float32).eps * cancelled)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cut_of_apollo_matches_reference(data):
    shape, parts = random_layout(data)
    rank = data.draw(st.integers(1, 6))
    assert_matches_reference("Apollo", shape, parts, bound=apollo_bound(shape, rank), rank=rank, update_proj_gap=2)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cut_of_online_subspace_descent_matches_reference(data):
    """From a random basis nothing is factored. The largest error of 2500 random cases was 9e-7."""
    shape, parts = random_layout(data)
    rank = data.draw(st.integers(1, 6))
    options = {"rank": rank, "basis_init": "random", "basis_lr_ratio": 1.0}
    assert_matches_reference("OnlineSubspaceDescent", shape, parts, **options)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_rows_and_columns_of_zeros_stay_zero(shape, method):
    """Adam at its usual epsilon would blow up rounding noise in their place, which differs from layout to layout.

    At that epsilon a rounding error of 1e-7 in an element a thousand times smaller than its neighbors becomes 1e-4.
    """
    options = of(method).cases[0] | {"lr": 1e-2, "eps": 1e-8}
    one, three = (ShardedMatrix(method, torch.zeros(shape), even_parts(shape, ranks), **options) for ranks in (1, 3))
    for step in range(6):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        gradient[[2, 5, 6]] = 0
        gradient[:, [1, 7]] = 0
        one.step(gradient)
        three.step(gradient)
    assert (one.weight - three.weight).norm() < 1e-4 * one.weight.norm()
    if of(method).keeps_zeros:
        assert one.weight[[2, 5, 6]].abs().max() == one.weight[:, [1, 7]].abs().max() == 0


def test_adarankgrad_state_shrinks_with_its_rank():
    shape = (30, 20)
    sharded = ShardedMatrix("AdaRankGrad", torch.zeros(shape), even_parts(shape, 3), rank_max=8, update_proj_gap=2)
    assert state_elements(sharded) == 8 * (2 * 30 + 20) + 1
    ranks = []
    for width in (6, 6, 3, 3, 5, 5):
        torch.manual_seed(width)
        sharded.step(torch.linalg.qr(torch.randn(30, width)).Q @ torch.randn(width, 20).sign())
        (rank,) = {state["rank"] for state in sharded.states}
        assert state_elements(sharded) == rank * (2 * 30 + 20) + 1
        ranks.append(rank)
    assert ranks[2] == ranks[3] < ranks[0] == ranks[1]
    assert ranks[4] == ranks[5] > ranks[3]


@pytest.mark.parametrize(("state_dtype", "column"), [("fp32", 4 * 128), ("bf16", 2 * 128), ("int8", 128 + 2 * 4)])
def test_gum_state_grows_and_shrinks_with_its_coin(state_dtype, column):
    """The matrix "w" is stepped whole in the second of four periods with seed 1. In int8 a column has two scales."""
    shape = (128, 64)
    options = {"rank": 4, "full_share": 0.5, "update_proj_gap": 2, "seed": 1, "state_dtype": state_dtype}
    sharded = ShardedMatrix("Gum", torch.zeros(shape), flat_parts(shape, [0, 3000]), **options)
    basis, columns = 4 * 4 * 64, []
    for step in range(8):
        torch.manual_seed(step)
        sharded.step(torch.randn(shape))
        stored = sum(
            t.numel() * t.element_size() for state in sharded.states for t in state.values() if torch.is_tensor(t)
        )
        assert stored == sharded.state_stores[0].nbytes(sharded.states[0])
        columns.append((stored - basis) / column)
    assert columns == [4, 4, 64, 64, 4, 4, 4, 4]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_rounds_do_not_grow_with_the_number_of_matrices(method):
    counts, options = [], of(method).cases[0]
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
            world.run([step_matrices(METHODS[method], [one.matrices[k] for one in many], 3) for k in range(3)])
            rounds.append(world.rounds)
        counts.append(rounds)
    assert counts[0] == counts[1]


@ALL_CASES
def test_zero_gradient_at_a_refresh_keeps_the_basis(method, options):
    """Also for parts that are empty. A subspace cannot be found in a gradient of zeros: the old one stays.

    The papers would take singular vectors of zero; the references that do are told to skip the refresh.
    """
    torch.manual_seed(0)
    shape = of(method).shapes[0]
    options = {"lr": 1e-2, "eps": 0.1, **options}
    start, gradients = of(method).start(shape), of(method).gradients_for(shape)
    reference = dense(method)(start.clone(), **options)
    sharded = ShardedMatrix(method, start, flat_parts(shape, [0, 50]), **options)
    for step in range(5):
        gradient = torch.zeros(shape) if step == 2 else gradients(step)
        sharded.step(gradient)
        step_keeping_basis(reference, gradient) if step == 2 else reference.step(gradient)
    assert (sharded.weight - reference.weight).norm() < ROUNDING * reference.weight.norm()


def step_keeping_basis(reference, gradient):
    """Take a step of a reference; if it refreshes its basis at fixed steps, whatever the gradient, not at this one."""
    if not isinstance(reference, DenseLorenza):
        reference.step(gradient)
        return
    gap, reference.gap = reference.gap, 10**9
    reference.step(gradient)
    reference.gap = gap
