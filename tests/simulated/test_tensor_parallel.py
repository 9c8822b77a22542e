"""Matrices that tensor parallelism splits or copies, and ZeRO cuts once more, against the dense references."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.errors import ConfigError
from ds_lowrank.optimizer.build_slots import _parts
from ds_lowrank.placement.tensor_parallel import AUTOTP, logical_matrices
from ds_lowrank.reference import DENSE
from ds_lowrank.sharding.layout import Block, ContiguousPart
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Request, all_reduce_route
from ds_lowrank.sharding.world import SimulatedWorld
from tests.simulated.harness import (
    ShardedMatrix,
    compare,
    directions_on,
    grid_order,
    grid_parts,
    relative_error,
    state_elements,
    step_together,
    tensor_blocks,
)
from tests.simulated.test_methods import CASES, GALORE, STATE, VLORP, gradients_for, stairs

CHOSEN = {
    "GaLore": [GALORE, GALORE | {"projector": "svd", "moments": "rotate", "proj_type": "reverse_std"}],
    "OnlineSubspaceDescent": [{"rank": 4}, {"rank": 4, "inner": "adafactor", "weight_decay": 0.1}],
    "VLoRP": [VLORP | {"granularity": 3}, VLORP | {"granularity": "1/2", "update_scheme": "original_space"}],
    "AdaRankGrad": CASES["AdaRankGrad"][:2],
    "Apollo": [CASES["Apollo"][0], {"mini": True, "update_proj_gap": 2}],
    "GradNormLoRP": [GALORE, GALORE | {"norm_axis": "input", "moments": "rotate"}],
    "Lorenza": [GALORE, {"rank": None}],
}
EACH = [(method, options) for method, cases in CHOSEN.items() for options in cases]
SPLITS = ("rows", "columns")
USUAL = {"lr": 1e-2, "eps": 0.1}  # as in `harness.relative_error`


@dataclass(frozen=True)
class FakeGrid:
    """What the marks on a parameter are read with."""

    tensor_rank: int
    tensor_size: int


def megatron_parameter(shape, dim, stride=1):
    parameter = torch.nn.Parameter(torch.empty(*shape))
    parameter.tensor_model_parallel, parameter.partition_stride = dim is not None, stride
    parameter.partition_dim = -1 if dim is None else dim
    return parameter


def autotp_parameter(shape, dim=None, sizes=None, replicated=False, sub_param_sizes=None):
    parameter = torch.nn.Parameter(torch.empty(*shape))
    meta = {
        "partition_dim": dim,
        "partition_sizes": sizes,
        "replicated": replicated,
        "sub_param_sizes": sub_param_sizes,
    }
    setattr(parameter, AUTOTP, meta)
    return parameter


def intervals_of(numels, cuts, order):
    """What each rank holds of the parameter on its tensor-parallel rank."""
    bounds = [[0, *sorted(own), numel] for own, numel in zip(cuts, numels, strict=True)]
    return [tuple(bounds[t][d : d + 2]) for t, d in order]


def inside_rows(numel, data):
    """Cuts at about equal distances, one element off."""
    return [numel * d // data + 1 for d in range(1, data)]


# 1. Every method, both kinds of split, cut anywhere.


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("data", [1, 2, 3])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_method_on_every_grid_cut_anywhere(tensor, data, split, method):
    """Shapes are at least twice the rank: 1e-6 is some roundings of fp32, not a badly conditioned sketch.

    Of 7000 random cases the worst was 7e-7.
    """
    side = st.sampled_from((12, 24) if method == "VLoRP" else (12, 16, 20, 24))

    def check(shape, cuts):
        parts = grid_parts(tensor_blocks(shape, split, tensor), cuts, grid_order(tensor, data))
        for options in CHOSEN[method]:
            compare(method, shape, parts, gradients=gradients_for(method, shape), **options)

    # Hypothesis begins with cuts at zero: parts that are empty.
    @settings(max_examples=1 if data == 1 else 3, deadline=None, database=None)
    @given(st.data())
    def check_drawn(drawn):
        shape = drawn.draw(st.tuples(side, side))
        cut = st.integers(0, shape[0] * shape[1] // tensor)
        check(shape, [drawn.draw(st.lists(cut, min_size=data - 1, max_size=data - 1)) for _ in range(tensor)])

    for shape in [(12, 24), (24, 12)]:
        numel = shape[0] * shape[1] // tensor
        check(shape, [[(cut + 5 * t) % numel for cut in inside_rows(numel, data)] for t in range(tensor)])
    check_drawn()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(12, 24), (24, 12)])
def test_the_official_view_of_vlorp_is_refused_where_its_units_are_torn_apart(shape, split):
    options = VLORP | {"granularity": 3, "left_view": "official", "proj_type": "left"}
    parts = grid_parts(tensor_blocks(shape, split, 2), [[35], [77]], grid_order(2, 2))
    if split == "rows":
        compare("VLoRP", shape, parts, **options)
    else:
        with pytest.raises(ConfigError, match="set left_view to 'transpose', or tensor_parallel_projection to 'local'"):
            ShardedMatrix("VLoRP", torch.zeros(shape), parts, **options)


# 2. The order of the ranks.


@pytest.mark.parametrize(("method", "options"), EACH, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_the_order_of_the_ranks_does_not_matter(split, method, options):
    shape, tensor, data = (24, 12), 4, 2
    blocks = tensor_blocks(shape, split, tensor)
    cuts = [[5], [31], [0], [72]]
    orders = [grid_order(tensor, data, "tensor"), grid_order(tensor, data, "data")]
    found = [
        relative_error(
            *(method, shape, grid_parts(blocks, cuts, order)), gradients=gradients_for(method, shape), **options
        )
        for order in orders
    ]
    (first, one), (second, other) = found
    assert max(first, second) < 1e-6
    assert (one.weight - other.weight).norm() < 1e-6 * one.weight.norm()


# 3. Layouts that are read off marks.


def elements(whole, held):
    """What a part holds of a matrix, in storage order."""
    pieces = [whole[r.row : r.row + r.height, r.col : r.col + r.width].reshape(-1) for r in held.rectangles]
    return torch.cat([whole.new_empty(0), *pieces])


MARKED = {
    "column-parallel": ((12, 6), 0, (4, 4, 4), lambda shape, own: megatron_parameter(shape, 0)),
    "row-parallel": ((6, 12), 1, (4, 4, 4), lambda shape, own: megatron_parameter(shape, 1)),
    "AutoTP rows": ((12, 6), 0, (4, 4, 4), lambda shape, own: autotp_parameter(shape, 0, (4, 4, 4))),
    "AutoTP uneven rows": ((11, 6), 0, (5, 4, 2), lambda shape, own: autotp_parameter(shape, 0, (5, 4, 2))),
    "AutoTP uneven columns": ((6, 11), 1, (2, 5, 4), lambda shape, own: autotp_parameter(shape, 1, (2, 5, 4))),
}


@pytest.mark.parametrize("own", range(3))
@pytest.mark.parametrize("marks", MARKED)
def test_marks_give_the_blocks_that_one_would_write_by_hand(marks, own):
    shape, dim, sizes, parameter = MARKED[marks]
    ends = [sum(sizes[:t]) for t in range(4)]
    blocks = [Block(span, (0, shape[1])) if dim == 0 else Block((0, shape[0]), span) for span in pairwise(ends)]
    local = tuple(sizes[own] if axis == dim else size for axis, size in enumerate(shape))
    (logical,) = logical_matrices(parameter(local, own), local, "w", FakeGrid(own, 3))
    assert (logical.name, logical.shape, logical.own, logical.placement) == ("w", shape, own, "sharded")
    for t, block in enumerate(blocks):
        for start in range(block.numel):
            for end in range(start + 1, block.numel + 1):
                assert logical.part(t, start, end) == ContiguousPart(block, start, end)
                if t == own:
                    assert logical.spans(start, end) == ((0, end - start),)
        assert logical.part(t, 3, 3).numel == 0


@pytest.mark.parametrize("marks", ["AutoTP uneven rows", "AutoTP uneven columns"])
def test_an_uneven_split_steps_the_logical_matrix(marks):
    shape, dim, sizes, parameter = MARKED[marks]
    local = tuple(sizes[0] if axis == dim else size for axis, size in enumerate(shape))
    (logical,) = logical_matrices(parameter(local, 0), local, "w", FakeGrid(0, 3))
    order = grid_order(3, 2)
    numels = [shape[1 - dim] * size for size in sizes]
    intervals = intervals_of(numels, [[7], [0], [11]], order)
    parts, peers = _parts(logical, [t for t, _ in order], intervals)
    assert peers == list(range(6))
    compare("GaLore", shape, parts, rank=2, update_proj_gap=2)


@pytest.mark.parametrize("own", range(2))
def test_a_stride_says_that_each_rank_has_a_share_of_every_matrix_in_the_weight(own):
    """Gate and up projection of a gated layer, one below the other on every rank."""
    whole = {"w.0": torch.arange(40.0).view(8, 5), "w.1": torch.arange(40.0, 80.0).view(8, 5)}
    halves = [torch.cat([matrix[4 * t : 4 * t + 4] for matrix in whole.values()]).view(-1) for t in range(2)]
    found = logical_matrices(megatron_parameter((8, 5), 0, stride=2), (8, 5), "w", FakeGrid(own, 2))
    assert [(logical.name, logical.shape, logical.placement) for logical in found] == [
        ("w.0", (8, 5), "sharded"),
        ("w.1", (8, 5), "sharded"),
    ]
    for start in range(0, 40, 3):
        for end in range(start, 41, 3):
            for logical in found:
                held = elements(whole[logical.name], logical.part(own, start, end))
                lying = [halves[own][start:end][slice(*span)] for span in logical.spans(start, end)]
                assert torch.equal(held, torch.cat([held[:0], *lying]))
            assert sum(logical.part(own, start, end).numel for logical in found) == end - start


def test_a_split_vector_is_one_row_and_what_is_not_marked_is_copied():
    for parameter in (megatron_parameter((4,), 0), autotp_parameter((4,), 0, (4, 4))):
        (bias,) = logical_matrices(parameter, (4,), "b", FakeGrid(1, 2))
        assert (bias.shape, bias.placement, bias.part(1, 1, 3)) == (
            (8,),
            "sharded",
            ContiguousPart(Block((0, 1), (4, 8)), 1, 3),
        )
    unmarked = torch.nn.Parameter(torch.empty(4, 6))
    for parameter in (unmarked, megatron_parameter((4, 6), None), autotp_parameter((4, 6), replicated=True)):
        (copied,) = logical_matrices(parameter, (4, 6), "w", FakeGrid(1, 2))
        assert (copied.shape, copied.placement) == ((4, 6), "replicated")
        assert copied.part(0, 5, 20) == copied.part(1, 5, 20) == ContiguousPart(Block((0, 4), (0, 6)), 5, 20)
        assert copied.as_local() is copied
        (alone,) = logical_matrices(parameter, (4, 6), "w", FakeGrid(0, 1))
        assert (alone.shape, alone.placement) == ((4, 6), "sharded")


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (lambda: megatron_parameter((4, 6), 2), "partition_dim does not say how it is split"),
        (lambda: autotp_parameter((4, 6), 0, (4, 4), sub_param_sizes=(2, 2)), "exclude it from AutoTP"),
        (lambda: autotp_parameter((4, 6), 0, None), "exclude it from AutoTP"),
    ],
)
def test_marks_that_do_not_say_how_are_refused(parameter, message):
    with pytest.raises(ConfigError, match=message):
        logical_matrices(parameter(), (4, 6), "w", FakeGrid(0, 2))


# 4. Copies.


def copies_beside_a_split_matrix(tensor, data, method, weight, **options):
    """A world, a split matrix in it, and a copy of ``weight`` on every tensor-parallel rank; all cut by data ranks."""
    order = grid_order(tensor, data)
    tensor_ranks = [t for t, _ in order]
    shape = tuple(weight.shape)
    split = ShardedMatrix(
        "GaLore",
        torch.zeros(24, 12),
        grid_parts(tensor_blocks((24, 12), "rows", tensor), [inside_rows(288 // tensor, data)] * tensor, order),
        **(USUAL | GALORE),
    )
    intervals = intervals_of([weight.numel()] * tensor, [inside_rows(weight.numel(), data)] * tensor, order)
    copies = []
    for own in range(tensor):
        (logical,) = logical_matrices(torch.nn.Parameter(torch.empty(shape)), shape, "copy", FakeGrid(own, tensor))
        parts, peers = _parts(logical, tensor_ranks, intervals)
        assert peers == [rank for rank, t in enumerate(tensor_ranks) if t == own]
        copies.append(ShardedMatrix(method, weight.clone(), parts, name="copy", peers=peers, **options))
    return SimulatedWorld(len(tensor_ranks)), split, copies


def assert_same_bits(copies, order):
    """Weights, and the state of the ranks that stand at the same place among their copy's."""
    first = copies[0]
    for own, copy in enumerate(copies):
        assert torch.equal(copy.weight, first.weight)
        for rank, (t, d) in enumerate(order):
            if t == own:
                for key, value in copy.states[rank].items():
                    same = first.states[order.index((0, d))][key]
                    assert torch.equal(value, same) if torch.is_tensor(value) else value == same


@pytest.mark.parametrize(("method", "options"), EACH, ids=str)
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 3), (4, 2)])
def test_copies_of_a_matrix_step_as_one_beside_a_split_matrix(tensor, data, method, options):
    torch.manual_seed(0)
    shape, options = (12, 24), USUAL | options
    start = torch.randn(shape) if method == "GradNormLoRP" else torch.zeros(shape)
    world, split, copies = copies_beside_a_split_matrix(tensor, data, method, start, **options)
    dense = DENSE[method](start.clone(), name="copy", **options)
    dense_split = DENSE["GaLore"](torch.zeros(24, 12), **(USUAL | GALORE))
    choose = gradients_for(method, shape) or (lambda step: torch.randn(shape))
    for step in range(4):
        gradient, other = choose(step), torch.randn(24, 12)
        dense.step(gradient)
        dense_split.step(other)
        step_together(world, [split, *copies], [other, *[gradient] * tensor])
        assert_same_bits(copies, grid_order(tensor, data))
    assert (copies[0].weight - dense.weight).norm() < 1e-6 * dense.weight.norm()
    assert (split.weight - dense_split.weight).norm() < 1e-6 * dense_split.weight.norm()


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 3), (4, 2)])
def test_copies_of_a_vector_step_as_one(tensor, data, state_dtype):
    """LORENZA without a rank is the rule for whatever is not projected: Adam of full size. In eight bits, blocks are
    stepped where they lie whole, so that one process has the same bits."""
    torch.manual_seed(0)
    options = {"rank": None, "lr": 1e-2, "weight_decay": 0.1, "state_dtype": state_dtype}
    start = torch.randn(1, 300)
    world, split, copies = copies_beside_a_split_matrix(tensor, data, "Lorenza", start, **options)
    alone = ShardedMatrix(
        "Lorenza", start.clone(), [ContiguousPart(Block((0, 1), (0, 300)), 0, 300)], name="copy", **options
    )
    kernel = torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([kernel], lr=1e-2, weight_decay=0.1)
    for step in range(4):
        gradient, other = torch.randn(1, 300), torch.randn(24, 12)
        kernel.grad = gradient.clone()
        adamw.step()
        alone.step(gradient)
        step_together(world, [split, *copies], [other, *[gradient] * tensor])
        assert_same_bits(copies, grid_order(tensor, data))
        assert torch.equal(copies[0].weight, alone.weight)
        if state_dtype == "fp32" or step == 0:  # nothing was rounded before
            assert (copies[0].weight - kernel).norm() < 1e-6 * kernel.norm()


@pytest.mark.parametrize(("method", "options"), [(method, cases[0]) for method, cases in CHOSEN.items()], ids=str)
def test_copies_of_a_matrix_in_eight_bits(method, options):
    """Of each other the same bits; how far from one process's, `test_methods` says."""
    torch.manual_seed(0)
    shape, options = (72, 144), USUAL | options | {"state_dtype": "int8"}
    world, split, copies = copies_beside_a_split_matrix(2, 2, method, torch.randn(shape), **options)
    choose = gradients_for(method, shape) or (lambda step: torch.randn(shape))
    for step in range(3):
        step_together(world, [split, *copies], [torch.randn(24, 12), *[choose(step)] * 2])
        assert_same_bits(copies, grid_order(2, 2))


# 5. Each shard as a matrix of its own.


def shards_apart(tensor, data, split, method, starts, **options):
    """A matrix whose blocks are stepped apart: every tensor-parallel rank's shard, over its data-parallel ranks."""
    shape, dim = tuple(starts[0].shape), SPLITS.index(split)
    intervals = intervals_of([shape[0] * shape[1]], [inside_rows(shape[0] * shape[1], data)], grid_order(1, data))
    shards = []
    for own, start in enumerate(starts):
        (logical,) = logical_matrices(megatron_parameter(shape, dim), shape, "w", FakeGrid(own, tensor))
        apart = logical.as_local()
        assert (apart.name, apart.shape, apart.placement) == (f"w@tensor{own}", shape, "local")
        parts, peers = _parts(apart, [own] * data, intervals)
        shards.append(ShardedMatrix(method, start.clone(), parts, name=apart.name, peers=peers, **options))
    return shards


def gradients_apart(method, shape, seed):
    if method == "AdaRankGrad":
        choose = stairs(shape)
        return lambda step: choose(100 * seed + step)
    return lambda step: torch.randn(shape, generator=torch.Generator().manual_seed(1 + 100 * seed + step))


LOCAL = [*EACH, ("VLoRP", VLORP | {"granularity": 3, "left_view": "official", "proj_type": "left"})]


@pytest.mark.parametrize(("method", "options"), LOCAL, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 3), (4, 2)])
def test_local_projection_is_the_method_on_each_shard_alone(tensor, data, split, method, options):
    shape, options = (12, 24) if split == "rows" else (24, 12), USUAL | options
    torch.manual_seed(0)
    starts = [torch.randn(shape) if method == "GradNormLoRP" else torch.zeros(shape) for _ in range(tensor)]
    shards = shards_apart(tensor, data, split, method, starts, **options)
    dense = [DENSE[method](start.clone(), name=f"w@tensor{t}", **options) for t, start in enumerate(starts)]
    for step in range(4):
        for t, (one, shard) in enumerate(zip(dense, shards, strict=True)):
            gradient = gradients_apart(method, shape, t)(step)
            one.step(gradient)
            shard.step(gradient)
    for shard, one in zip(shards, dense, strict=True):
        assert (shard.weight - one.weight).norm() < 1e-6 * one.weight.norm()


def test_a_world_whose_ranks_ask_for_different_things_is_refused():
    route = all_reduce_route(2, 3)

    def asking(columns, rounds):
        for _ in range(rounds):
            yield [Request(route, torch.ones(3, columns))]

    SimulatedWorld(2).run([asking(2, 1), asking(2, 1)])
    for programs in ([asking(2, 1), asking(2, 2)], [asking(2, 1), asking(1, 1)]):
        with pytest.raises(RuntimeError, match="the ranks disagree on the round"):
            SimulatedWorld(2).run(programs)


# 6. What is stored, and what travels.


@pytest.mark.parametrize(("method", "options", "formula"), STATE, ids=lambda v: "" if callable(v) else str(v))
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_state_over_all_ranks_is_that_of_one_process(shape, split, method, options, formula):
    for tensor in (1, 2, 4):
        for data in (1, 2, 3):
            blocks = tensor_blocks(shape, split, tensor)
            parts = grid_parts(blocks, [inside_rows(blocks[0].numel, data)] * tensor, grid_order(tensor, data))
            sharded = ShardedMatrix(method, torch.zeros(shape), parts, **options)
            assert state_elements(sharded) == formula(40, 20)
    torch.manual_seed(0)
    sharded.step(torch.randn(shape))
    assert state_elements(sharded) == formula(40, 20)


@pytest.mark.parametrize(("method", "options"), EACH, ids=str)
def test_a_split_costs_no_rounds(method, options):
    """As many as data parallelism alone, for the same gradients; in three steps is each kind of step."""
    counts = set()
    for tensor, data, split in [(1, 2, "rows"), (2, 1, "columns"), (4, 1, "rows"), (2, 2, "columns"), (2, 2, "rows")]:
        blocks = tensor_blocks((24, 12), split, tensor)
        parts = grid_parts(blocks, [inside_rows(blocks[0].numel, data)] * tensor, grid_order(tensor, data))
        gradients = gradients_for(method, (24, 12))
        _, sharded = relative_error(method, (24, 12), parts, steps=3, gradients=gradients, **options)
        counts.add(sharded.world.rounds)
    assert len(counts) == 1


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("split", SPLITS)
def test_an_ordinary_step_of_galore_sends_projections_and_bases_only(split, tensor):
    """Rows of the basis to whoever has their columns, rows of R where columns are split; and one number to decide."""
    (m, n), r = (24, 12), 4
    parts = grid_parts(tensor_blocks((m, n), split, tensor), [[]] * tensor, grid_order(tensor, 1))
    sharded = ShardedMatrix("GaLore", torch.zeros(m, n), parts, rank=r)
    torch.manual_seed(0)
    sharded.step(torch.randn(m, n))
    before = list(sharded.world.bytes_sent)
    sharded.step(torch.randn(m, n))
    shared = n if split == "rows" else 2 * m
    expected = 4 * (shared * r * (tensor - 1) // tensor + (tensor - 1))
    assert [after - own for after, own in zip(sharded.world.bytes_sent, before, strict=True)] == [expected] * tensor


# 7. LORENZA's directions.


FORMS = [{"rank": 3}, {"rank": 3, "probe_form": "gaussian"}, {"rank": 3, "proj_type": "reverse_std"}, {"rank": None}]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 3), (4, 2)])
def test_directions_on_blocks_put_together_are_the_whole_matrixs(tensor, data, shape, split, form):
    """Below stage 3 a rank moves the whole of its block, whatever it holds of it."""
    torch.manual_seed(0)
    gradient, order = torch.randn(shape), grid_order(tensor, data)
    blocks = tensor_blocks(shape, split, tensor)
    parts = grid_parts(blocks, [inside_rows(blocks[0].numel, data)] * tensor, order)
    twin = DENSE["Lorenza"](torch.zeros(shape), **form)
    sharded = ShardedMatrix("Lorenza", torch.zeros(shape), parts, lr=1e-2, **form)
    twin.step(gradient)
    sharded.step(gradient)
    expected = twin.direction("1 probe 0.0")
    targets = [
        MatrixShard("w", shape, [ContiguousPart(blocks[t], 0, blocks[t].numel)], 0, sharded.shards[0].side, 0)
        for t, _ in order
    ]
    assembled, squares = torch.full(shape, torch.nan), set()
    for (t, _), target, directions in zip(order, targets, directions_on(sharded, targets), strict=True):
        coordinates = directions.draw("1 probe 0.0")
        (r0, r1), (c0, c1) = blocks[t].rows, blocks[t].cols
        moved = directions.to_matrix(coordinates).dense(target).view(r1 - r0, c1 - c0)
        found = assembled[r0:r1, c0:c1]
        assert found.isnan().all() or torch.equal(found, moved)  # data ranks move alike
        assembled[r0:r1, c0:c1] = moved
        squares.add(directions.square(coordinates))
    assert (assembled - expected).norm() < 1e-6 * expected.norm()
    (square,) = squares
    assert square == pytest.approx(expected.square().sum().item(), rel=1e-5)
