"""Fused weights read as the logical matrices in them: every element's rank and place, under any tensor and ZeRO cut.

The tests cut whole numbered matrices as megatron-core cuts its weights, and read them back through
``logical_matrices``.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ds_lowrank
from ds_lowrank.placement.parameter_names import tag_parameters
from ds_lowrank.placement.tensor_parallel import logical_matrices

NAME = "layers.0.weight"
DEGREES = st.sampled_from([1, 2, 4])


def fake_grid(tensor, rank=0):
    return SimpleNamespace(tensor_size=tensor, tensor_rank=rank)


def numbered_matrices(sizes, width):
    """Matrices with these numbers of rows, whose elements all differ."""
    ends = [0, *itertools.accumulate(sizes.values())]
    numbers = torch.arange(ends[-1] * width, dtype=torch.float64).view(-1, width)
    return {name: numbers[lo:hi] for name, (lo, hi) in zip(sizes, itertools.pairwise(ends), strict=True)}


def column_parallel(shard, stride=1):
    """A parameter as megatron-core's column-parallel layer marks it."""
    parameter = torch.nn.Parameter(shard.clone())
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, 0, stride
    return parameter


def qkv_shards(groups, queries, head, width, tensor):
    """The matrices, and every rank's weight: ``q q k v`` for each group of heads, rows split over ranks in order."""
    whole = numbered_matrices({"q": groups * queries * head, "k": groups * head, "v": groups * head}, width)
    by_group = [whole[name].view(groups, -1, width) for name in ("q", "k", "v")]
    fused = torch.cat(by_group, dim=1).reshape(-1, width)
    assume(len(fused) % tensor == 0)
    shards = [column_parallel(shard) for shard in fused.chunk(tensor)]
    for shard in shards:
        ds_lowrank.tag_fused(shard, {"q": queries * head, "k": head, "v": head})
    return whole, shards


def swiglu_shards(half, width, tensor, tagged):
    """The matrices, and every rank's weight: its rows of gate above its rows of up (``partition_stride`` 2)."""
    names = ("gate", "up") if tagged else ("0", "1")
    whole = numbered_matrices(dict.fromkeys(names, tensor * half), width)
    parts = [whole[name].chunk(tensor) for name in names]
    shards = [column_parallel(torch.cat(pieces), stride=2) for pieces in zip(*parts, strict=True)]
    for shard in shards if tagged else ():
        ds_lowrank.tag_fused(shard, {"gate": half, "up": half})
    return whole, shards


@st.composite
def qkv_layers(draw):
    sizes = [draw(st.integers(1, 3)) for _ in range(4)]
    return qkv_shards(*sizes, draw(DEGREES))


@st.composite
def swiglu_layers(draw):
    return swiglu_shards(draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(DEGREES), draw(st.booleans()))


def layouts(shards, grid_size, form=lambda logical: logical):
    """How each tensor-parallel rank reads its weight: for every rank, the matrices by their piece's name."""
    found = []
    for rank, shard in enumerate(shards):
        matrices = logical_matrices(shard, tuple(shard.shape), NAME, fake_grid(grid_size, rank))
        assert [logical.name for logical in matrices] == [f"{NAME}.{logical.piece}" for logical in matrices]
        found.append({logical.piece: form(logical) for logical in matrices})
    return found


def zero_cuts(data, numel):
    """Consecutive intervals of a weight, one for each of some data-parallel ranks; some may be empty."""
    cuts = data.draw(st.lists(st.integers(0, numel), max_size=3))
    return list(itertools.pairwise([0, *sorted(cuts), numel]))


def place_elements(matrix, covered, held, elements):
    """Write a rank's elements into the matrix by its rectangles, and count the writes to each place."""
    assert held.numel == len(elements)
    for r in held.rectangles:
        place = slice(r.row, r.row + r.height), slice(r.col, r.col + r.width)
        matrix[place] = elements[r.offset : r.offset + r.height * r.width].view(r.height, r.width)
        covered[place] += 1


@settings(max_examples=150, deadline=None)
@given(st.data(), st.one_of(qkv_layers(), swiglu_layers()))
def test_one_rank_stores_each_element_of_every_matrix(data, layer):
    whole, shards = layer
    readings = layouts(shards, len(shards))
    found = {name: torch.zeros_like(matrix) for name, matrix in whole.items()}
    covered = {name: torch.zeros_like(matrix) for name, matrix in whole.items()}
    for rank, (shard, own) in enumerate(zip(shards, readings, strict=True)):
        assert list(own) == list(whole)
        for start, end in zero_cuts(data, shard.numel()):
            flat = shard.detach().view(-1)[start:end]
            spans = {name: logical.spans(start, end) for name, logical in own.items()}
            in_order = sorted(itertools.chain.from_iterable(spans.values()))
            assert all(before[1] == after[0] for before, after in itertools.pairwise(in_order))
            assert sum(hi - lo for lo, hi in in_order) == end - start
            for name, logical in own.items():
                assert logical.shape == whole[name].shape
                elements = torch.cat([flat[:0], *(flat[lo:hi] for lo, hi in spans[name])])
                held = logical.part(rank, start, end)
                assert all(other[name].part(rank, start, end) == held for other in readings)
                place_elements(found[name], covered[name], held, elements)
    for name, matrix in whole.items():
        assert torch.equal(covered[name], torch.ones_like(matrix))
        assert torch.equal(found[name], matrix)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.one_of(qkv_layers(), swiglu_layers()))
def test_one_rank_stores_each_element_of_the_row_for_adamw(data, layer):
    whole, shards = layer
    readings = layouts(shards, len(shards), lambda logical: logical.as_row())
    for name, matrix in whole.items():
        row, covered = torch.zeros(1, matrix.numel(), dtype=matrix.dtype), torch.zeros(1, matrix.numel())
        for rank, shard in enumerate(shards):
            logical = readings[rank][name]
            assert logical.shape == row.shape
            for start, end in zero_cuts(data, shard.numel()):
                flat = shard.detach().view(-1)[start:end]
                elements = torch.cat([flat[:0], *(flat[lo:hi] for lo, hi in logical.spans(start, end))])
                place_elements(row, covered, logical.part(rank, start, end), elements)
        assert torch.equal(covered, torch.ones_like(covered))
        assert torch.equal(row.view_as(matrix), matrix)  # all columns are on one rank: the elements keep their order


@settings(max_examples=100, deadline=None)
@given(st.one_of(qkv_layers(), swiglu_layers()))
def test_a_ranks_own_matrices_are_its_rows_in_order(layer):
    """``tensor_parallel_projection: local`` projects a rank's rows of a matrix as a matrix of its own.

    A matrix that is whole on one rank is that rank's. Where only some other ranks have no rows, every rank refuses.
    """
    whole, shards = layer
    readings = layouts(shards, len(shards))
    for name, matrix in whole.items():
        if (owner := readings[0][name].owner) is not None:
            own = readings[owner][name].as_local()
            assert own.shape == matrix.shape
            assert torch.equal(own_rows(shards[owner], own, owner), matrix)
            continue
        if not all(readings[0][name].strips):
            with pytest.raises(ds_lowrank.ConfigError, match="not every rank can project its own"):
                readings[0][name].as_local()
            continue
        readings = [own | {name: own[name].as_local()} for own in readings]
        below = torch.cat([own_rows(shard, readings[rank][name], rank) for rank, shard in enumerate(shards)])
        assert torch.equal(below, matrix)


def own_rows(shard, logical, rank):
    """Assemble this rank's matrix from the rectangles of its part."""
    matrix, covered = torch.zeros(logical.shape, dtype=shard.dtype), torch.zeros(logical.shape)
    flat = shard.detach().view(-1)
    elements = torch.cat([flat[:0], *(flat[lo:hi] for lo, hi in logical.spans(0, len(flat)))])
    place_elements(matrix, covered, logical.part(rank, 0, len(flat)), elements)
    assert torch.equal(covered, torch.ones_like(covered))
    return matrix


def test_more_tensor_ranks_than_head_groups_split_a_period():
    """Two groups of ``q q k v`` on four ranks, a head of one row: ``q q | k v | q q | k v``."""
    whole, shards = qkv_shards(groups=2, queries=2, head=1, width=3, tensor=4)
    own = layouts(shards, 4)
    assert [{name: logical.part(rank, 0, 6).numel for name, logical in own[rank].items()} for rank in range(4)] == [
        {"q": 6, "k": 0, "v": 0},
        {"q": 0, "k": 3, "v": 3},
        {"q": 6, "k": 0, "v": 0},
        {"q": 0, "k": 3, "v": 3},
    ]
    assert torch.equal(shards[2].detach(), whole["q"][2:])


def test_a_whole_weight_on_every_tensor_rank_is_replicated():
    weight = torch.nn.Parameter(torch.zeros(12, 5))
    ds_lowrank.tag_fused(weight, {"gate": 6, "up": 6})
    gate, up = logical_matrices(weight, (12, 5), NAME, fake_grid(2, 1))
    assert (gate.placement, up.placement, gate.shape) == ("replicated", "replicated", (6, 5))
    assert gate.spans(0, 60) == ((0, 30),)
    assert up.spans(0, 60) == ((30, 60),)


def test_a_piece_with_a_dot_in_its_name_replaces_the_whole_name():
    weight = torch.nn.Parameter(torch.zeros(8, 5))
    ds_lowrank.tag_fused(weight, {"model.q_proj.weight": 4, "k": 4})
    assert [m.name for m in logical_matrices(weight, (8, 5), NAME, fake_grid(1))] == [
        "model.q_proj.weight",
        f"{NAME}.k",
    ]


@pytest.mark.parametrize(("rows", "tensor"), [(10, 1), (5, 2)])
def test_a_fraction_of_a_period_of_rows_is_refused(rows, tensor):
    weight = column_parallel(torch.zeros(rows, 3))
    ds_lowrank.tag_fused(weight, {"q": 2, "k": 1, "v": 1})
    with pytest.raises(ds_lowrank.ConfigError, match=r"layers\.0\.weight: 10 rows are not a multiple of the 4"):
        logical_matrices(weight, tuple(weight.shape), NAME, fake_grid(tensor))
    with pytest.raises(ds_lowrank.ConfigError, match="not a multiple"):
        ds_lowrank.GaLore([("plain", torch.nn.Parameter(torch.zeros(1, 3))), ("fused", weight)], rank=1)


def test_a_fused_weight_whose_columns_are_split_is_refused():
    """It would be projected as one matrix here, and as several where it is not split."""
    weight = column_parallel(torch.zeros(12, 3))
    weight.partition_dim = 1
    ds_lowrank.tag_fused(weight, {"gate": 6, "up": 6})
    with pytest.raises(ds_lowrank.ConfigError, match="tensor parallelism splits its columns"):
        logical_matrices(weight, (12, 3), NAME, fake_grid(2))


@pytest.mark.parametrize("sizes", [(5, 3), (3, 5), (4, 4)])
def test_ranks_may_have_different_numbers_of_rows(sizes):
    """AutoTP splits rows so where they do not divide by the ranks."""
    whole = numbered_matrices({"gate": 4, "up": 4}, width=2)
    shards = [torch.nn.Parameter(shard) for shard in torch.cat(list(whole.values())).split(sizes)]
    meta = {"replicated": False, "partition_dim": 0, "partition_sizes": sizes, "sub_param_sizes": None}
    for shard in shards:
        shard.ds_autotp_universal_checkpoint_meta = meta
        ds_lowrank.tag_fused(shard, {"gate": 4, "up": 4})
    readings = layouts(shards, 2)
    for name, matrix in whole.items():
        found, covered = torch.zeros_like(matrix), torch.zeros_like(matrix)
        for rank, shard in enumerate(shards):
            flat, logical = shard.detach().view(-1), readings[rank][name]
            elements = torch.cat([flat[:0], *(flat[lo:hi] for lo, hi in logical.spans(0, len(flat)))])
            place_elements(found, covered, logical.part(rank, 0, len(flat)), elements)
        assert torch.equal(covered, torch.ones_like(matrix))
        assert torch.equal(found, matrix)


def attention_module(qkv, heads, groups, head, gated=False):
    module = torch.nn.Module()
    module.linear_qkv = torch.nn.Module()
    module.linear_qkv.weight = qkv
    module.num_attention_heads_per_partition, module.num_query_groups_per_partition = heads, groups
    module.hidden_size_per_attention_head = head
    module.config = SimpleNamespace(attention_output_gate=gated)
    return module


def test_fused_marks_of_megatron_layers_yield_to_an_explicit_tag():
    model = torch.nn.Module()
    model.attention = attention_module(column_parallel(torch.zeros(32, 6)), heads=4, groups=2, head=4)
    model.mlp = torch.nn.Module()
    model.mlp.linear_fc1 = torch.nn.Module()
    model.mlp.linear_fc1.weight = column_parallel(torch.zeros(20, 6), stride=2)
    model.mlp.plain = torch.nn.Linear(6, 20)
    model.gated = attention_module(column_parallel(torch.zeros(48, 6)), heads=4, groups=2, head=4, gated=True)
    model.other = attention_module(column_parallel(torch.zeros(32, 6)), heads=4, groups=2, head=4)
    ds_lowrank.tag_fused(model.other.linear_qkv.weight, {"all": 32})
    tag_parameters(model)
    found = {
        logical.name: logical.shape
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        for logical in logical_matrices(parameter, tuple(parameter.shape), name, fake_grid(1))
    }
    assert found == {
        "attention.linear_qkv.weight.q": (16, 6),
        "attention.linear_qkv.weight.k": (8, 6),
        "attention.linear_qkv.weight.v": (8, 6),
        "gated.linear_qkv.weight.q": (16, 6),
        "gated.linear_qkv.weight.gate": (16, 6),
        "gated.linear_qkv.weight.k": (8, 6),
        "gated.linear_qkv.weight.v": (8, 6),
        "mlp.linear_fc1.weight.gate": (10, 6),
        "mlp.linear_fc1.weight.up": (10, 6),
        "mlp.plain.weight": (20, 6),
        "other.linear_qkv.weight.all": (32, 6),
    }
