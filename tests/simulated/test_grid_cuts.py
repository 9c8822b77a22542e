"""Matrices that tensor parallelism splits and ZeRO cuts once more, against the dense references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.errors import ConfigError
from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.build_slots import _parts
from ds_lowrank.placement.tensor_parallel import logical_matrices
from tests.methods import of
from tests.rows.vlorp import VLORP
from tests.simulated.harness import (
    ROUNDING,
    ShardedMatrix,
    assert_matches_reference,
    grid_order,
    grid_parts,
    relative_error,
    tensor_blocks,
)
from tests.simulated.tensor_parallel import (
    CASES,
    SPLITS,
    FakeGrid,
    autotp_parameter,
    cuts_inside_rows,
    intervals_of,
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("data", [1, 2, 3])
@pytest.mark.parametrize("tensor", [2, 4])
def test_every_method_on_every_grid_cut_anywhere(tensor, data, split, method):
    """Every side is at least twice the rank, so no sketch is badly conditioned.

    The worst of 7000 random cases was 7e-7. ``tensor`` 1 is in test_methods.py.
    """
    side = st.sampled_from((12, 24) if method == "VLoRP" else (12, 16, 20, 24))

    def check(shape, cuts):
        parts = grid_parts(tensor_blocks(shape, split, tensor), cuts, grid_order(tensor, data))
        for options in of(method).grid_options:
            assert_matches_reference(method, shape, parts, gradients=of(method).gradients_for(shape), **options)

    # Hypothesis begins with cuts at zero, which leave parts empty.
    @settings(max_examples=1 if data == 1 else 3, deadline=None, database=None)
    @given(st.data())
    def check_drawn(drawn):
        shape = drawn.draw(st.tuples(side, side))
        cut = st.integers(0, shape[0] * shape[1] // tensor)
        check(shape, [drawn.draw(st.lists(cut, min_size=data - 1, max_size=data - 1)) for _ in range(tensor)])

    for shape in [(12, 24), (24, 12)]:
        numel = shape[0] * shape[1] // tensor
        check(shape, [[(cut + 5 * t) % numel for cut in cuts_inside_rows(numel, data)] for t in range(tensor)])
    check_drawn()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(12, 24), (24, 12)])
def test_vlorps_official_view_is_refused_where_a_split_cuts_its_units(shape, split):
    options = VLORP | {"granularity": 3, "left_view": "official", "proj_type": "left"}
    parts = grid_parts(tensor_blocks(shape, split, 2), [[35], [77]], grid_order(2, 2))
    if split == "rows":
        assert_matches_reference("VLoRP", shape, parts, **options)
    else:
        with pytest.raises(ConfigError, match="set left_view to 'transpose', or tensor_parallel_projection to 'local'"):
            ShardedMatrix("VLoRP", torch.zeros(shape), parts, **options)


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_the_order_of_ranks_does_not_change_the_update(split, method, options):
    shape, tensor, data = (24, 12), 4, 2
    blocks = tensor_blocks(shape, split, tensor)
    cuts = [[5], [31], [0], [72]]
    orders = [grid_order(tensor, data, "tensor"), grid_order(tensor, data, "data")]
    found = [
        relative_error(
            *(method, shape, grid_parts(blocks, cuts, order)), gradients=of(method).gradients_for(shape), **options
        )
        for order in orders
    ]
    (first, one), (second, other) = found
    assert max(first, second) < ROUNDING
    assert (one.weight - other.weight).norm() < ROUNDING * one.weight.norm()


@pytest.mark.parametrize(("shape", "dim", "sizes"), [((11, 6), 0, (5, 4, 2)), ((6, 11), 1, (2, 5, 4))])
def test_an_uneven_split_by_autotp_steps_the_logical_matrix(shape, dim, sizes):
    local = tuple(sizes[0] if axis == dim else size for axis, size in enumerate(shape))
    (logical,) = logical_matrices(autotp_parameter(local, dim, sizes), local, "w", FakeGrid(0, 3))
    order = grid_order(3, 2)
    numels = [shape[1 - dim] * size for size in sizes]
    intervals = intervals_of(numels, [[7], [0], [11]], order)
    parts, peers = _parts(logical, [t for t, _ in order], intervals)
    assert peers == list(range(6))
    assert_matches_reference("GaLore", shape, parts, rank=2, update_proj_gap=2)
