"""What a matrix on a grid costs: elements of state, rounds of exchange, and bytes sent."""

from __future__ import annotations

import pytest
import torch

from tests.methods import of
from tests.simulated.harness import (
    ROUNDING,
    ShardedMatrix,
    grid_order,
    grid_parts,
    relative_error,
    state_elements,
    tensor_blocks,
)
from tests.simulated.state_formulas import STATE
from tests.simulated.tensor_parallel import CASES, SPLITS, cuts_inside_rows


@pytest.mark.parametrize(("method", "options", "formula"), STATE, ids=lambda v: "" if callable(v) else str(v))
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_state_over_all_ranks_is_that_of_one_process(shape, split, method, options, formula):
    for tensor in (2, 4):
        for data in (1, 2, 3):
            blocks = tensor_blocks(shape, split, tensor)
            parts = grid_parts(blocks, [cuts_inside_rows(blocks[0].numel, data)] * tensor, grid_order(tensor, data))
            sharded = ShardedMatrix(method, torch.zeros(shape), parts, **options)
            assert state_elements(sharded) == formula(40, 20)
    torch.manual_seed(0)
    sharded.step(torch.randn(shape))
    assert state_elements(sharded) == formula(40, 20)


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_a_split_adds_no_rounds(method, options):
    """Rounds are those of data parallelism alone for the same gradients; three steps include each kind of step."""
    counts = set()
    for tensor, data, split in [(1, 2, "rows"), (2, 1, "columns"), (4, 1, "rows"), (2, 2, "columns"), (2, 2, "rows")]:
        blocks = tensor_blocks((24, 12), split, tensor)
        parts = grid_parts(blocks, [cuts_inside_rows(blocks[0].numel, data)] * tensor, grid_order(tensor, data))
        gradients = of(method).gradients_for((24, 12))
        error, sharded = relative_error(method, (24, 12), parts, steps=3, gradients=gradients, **options)
        assert error < ROUNDING  # not all of these options run on data ranks alone in test_methods.py
        counts.add(sharded.world.rounds)
    assert len(counts) == 1


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("split", SPLITS)
def test_a_galore_step_without_refresh_sends_only_projections_and_bases(split, tensor):
    """Rows of the basis go to the ranks that store their columns, rows of R where columns are split, and one number."""
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
