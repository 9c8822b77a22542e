"""Parameters that every tensor-parallel rank stores as a copy: the copies keep the same bits."""

from __future__ import annotations

import pytest
import torch

from ds_lowrank.methods import METHODS
from ds_lowrank.optimizer.build_slots import _parts
from ds_lowrank.optimizer.step import step_matrices
from ds_lowrank.placement.tensor_parallel import logical_matrices
from ds_lowrank.reference import DENSE
from ds_lowrank.sharding.layout import EMPTY, Block, ContiguousPart, whole
from ds_lowrank.sharding.world import SimulatedWorld
from tests.methods import of
from tests.rows.row import CASE
from tests.simulated.harness import ROUNDING, ShardedMatrix, grid_order, grid_parts, step_together, tensor_blocks
from tests.simulated.tensor_parallel import (
    CASES,
    COMMON,
    FakeGrid,
    cuts_inside_rows,
    intervals_of,
)


def copies_beside_a_split_matrix(tensor, data, method, weight, **options):
    """A world with a split matrix and, on every tensor-parallel rank, a copy of ``weight``; data ranks cut all."""
    order = grid_order(tensor, data)
    tensor_ranks = [t for t, _ in order]
    shape = tuple(weight.shape)
    split = ShardedMatrix(
        "GaLore",
        torch.zeros(24, 12),
        grid_parts(tensor_blocks((24, 12), "rows", tensor), [cuts_inside_rows(288 // tensor, data)] * tensor, order),
        **(COMMON | CASE),
    )
    intervals = intervals_of([weight.numel()] * tensor, [cuts_inside_rows(weight.numel(), data)] * tensor, order)
    copies = []
    for own in range(tensor):
        (logical,) = logical_matrices(torch.nn.Parameter(torch.empty(shape)), shape, "copy", FakeGrid(own, tensor))
        parts, peers = _parts(logical, tensor_ranks, intervals)
        assert peers == [rank for rank, t in enumerate(tensor_ranks) if t == own]
        copies.append(ShardedMatrix(method, weight.clone(), parts, name="copy", peers=peers, **options))
    return SimulatedWorld(len(tensor_ranks)), split, copies


def assert_same_bits(copies, order):
    """Compare the weights, and the state of the ranks that store the same part of their copy."""
    first = copies[0]
    for own, copy in enumerate(copies):
        assert torch.equal(copy.weight, first.weight)
        for rank, (t, d) in enumerate(order):
            if t == own:
                for key, value in copy.states[rank].items():
                    same = first.states[order.index((0, d))][key]
                    assert torch.equal(value, same) if torch.is_tensor(value) else value == same


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 3), (4, 2)])
def test_copies_of_a_matrix_step_as_one_beside_a_split_matrix(tensor, data, method, options):
    torch.manual_seed(0)
    shape, options = (12, 24), COMMON | options
    start = torch.randn(shape) if method == "GradNormLoRP" else torch.zeros(shape)
    world, split, copies = copies_beside_a_split_matrix(tensor, data, method, start, **options)
    dense = DENSE[method](start.clone(), name="copy", **options)
    dense_split = DENSE["GaLore"](torch.zeros(24, 12), **(COMMON | CASE))
    choose = of(method).gradients_for(shape)
    for step in range(4):
        gradient, other = choose(step), torch.randn(24, 12)
        dense.step(gradient)
        dense_split.step(other)
        step_together(world, [split, *copies], [other, *[gradient] * tensor])
        assert_same_bits(copies, grid_order(tensor, data))
    assert (copies[0].weight - dense.weight).norm() < ROUNDING * dense.weight.norm()
    assert (split.weight - dense_split.weight).norm() < ROUNDING * dense_split.weight.norm()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_ranks_that_hold_nothing_take_part_in_split_matrices_and_in_copies(method):
    """Data rank 1 has no element of either. A sum of the split matrix goes over four ranks, one of a copy over two."""
    torch.manual_seed(0)
    shape, options = (12, 24), COMMON | of(method).small
    starts = [of(method).start(shape) for _ in range(2)]
    blocks = [Block((0, 6), (0, 24)), Block((6, 12), (0, 24))]
    halves = [ContiguousPart(block, 0, block.numel) for block in blocks]
    split = ShardedMatrix(method, starts[0].clone(), [*halves, EMPTY, EMPTY], name="split", **options)
    copies = []
    for own in range(2):
        parts = [EMPTY] * 4
        parts[own] = whole(shape, 0, 288)
        copies.append(ShardedMatrix(method, starts[1].clone(), parts, name="copy", peers=(own, own + 2), **options))
    dense = [DENSE[method](w.clone(), name=n, **options) for n, w in zip(("split", "copy"), starts, strict=True)]
    ranks = [[split.matrices[rank], copies[rank % 2].matrices[rank]] for rank in range(4)]
    for stepped in ranks:
        for number, matrix in enumerate(stepped):  # of one group
            matrix.options, matrix.member = split.options, matrix.member._replace(number=number)
    choose = of(method).gradients_for(shape)
    for step in range(4):
        gradients = [choose(2 * step + i) for i in range(2)]
        for reference, gradient in zip(dense, gradients, strict=True):
            reference.step(gradient)
        split.attach(gradients[0])
        for copy in copies:
            copy.attach(gradients[1])
        SimulatedWorld(4).run([step_matrices(METHODS[method], stepped, 4) for stepped in ranks])
        for matrix in (split, *copies):
            matrix.gather()
    for matrix, reference in ((split, dense[0]), (copies[0], dense[1]), (copies[1], dense[1])):
        assert (matrix.weight - reference.weight).norm() < ROUNDING * reference.weight.norm()


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 3), (4, 2)])
def test_copies_of_a_vector_step_as_one(tensor, data, state_dtype):
    """LORENZA without a rank is full-rank Adam, the rule for parameters that are not projected.

    In eight bits, a rank steps whole blocks only, so that one process has the same bits.
    """
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
            assert (copies[0].weight - kernel).norm() < ROUNDING * kernel.norm()


@pytest.mark.parametrize(("method", "options"), [(method, of(method).grid_options[0]) for method in METHODS], ids=str)
def test_copies_of_a_matrix_in_eight_bits_keep_the_same_bits(method, options):
    """The copies have the same bits; test_methods.py bounds their distance from one process."""
    torch.manual_seed(0)
    shape, options = (72, 144), COMMON | options | {"state_dtype": "int8"}
    world, split, copies = copies_beside_a_split_matrix(2, 2, method, torch.randn(shape), **options)
    choose = of(method).gradients_for(shape)
    for step in range(3):
        step_together(world, [split, *copies], [torch.randn(24, 12), *[choose(step)] * 2])
        assert_same_bits(copies, grid_order(2, 2))
