"""GaLore alone: how sensitive a basis is to rounding, which rank owns what, and what is not copied."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.methods.galore import GaLoreMethod
from ds_lowrank.reference.galore import positive_qr
from ds_lowrank.reference.sketch import sketch
from ds_lowrank.sharding.reduce import SingleProcess, lockstep
from tests.simulated.harness import ROUNDING, ShardedMatrix, assert_matches_reference, flat_parts


def rounding_bound(shape, rank, steps=4, gap=2):
    """Four roundings of fp32 times the condition of the sketches in ``harness.relative_error``, at least ``ROUNDING``.

    A basis is as sensitive as the sketch that it is computed from, and a sketch with nearly as many columns as the
    matrix can be badly conditioned. The largest error of 8000 random cases was a quarter of the bound.
    """
    torch.manual_seed(0)
    condition = 1.0
    for step in range(steps):
        gradient = torch.randn(shape)
        if step % gap == 0:
            turned = gradient if shape[0] >= shape[1] else gradient.T
            tall = turned @ sketch(0, "w", step, turned.shape[1], min(rank, *shape))
            for factored in (tall, turned.T @ positive_qr(tall)):
                condition = max(condition, torch.linalg.cond(factored).item())
    return max(ROUNDING, 4 * torch.finfo(torch.float32).eps * condition)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_cut_match_reference(data):
    shape = data.draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    ranks = data.draw(st.integers(1, 6))
    cuts = data.draw(st.lists(st.integers(0, shape[0] * shape[1]), min_size=ranks - 1, max_size=ranks - 1))
    rank = data.draw(st.integers(1, 6))
    options = {"rank": rank, "update_proj_gap": 2}
    assert_matches_reference("GaLore", shape, flat_parts(shape, cuts), rounding_bound(shape, rank), **options)


def test_row_shared_by_many_ranks_has_one_owner():
    parts = flat_parts((5, 40), [3, 11, 12, 39, 60])
    sharded = assert_matches_reference("GaLore", (5, 40), parts, rank=3, update_proj_gap=2)
    for axis in ("kept", "compressed"):
        layout = getattr(sharded.matrices[0].geometry, axis)
        owned = sorted(span for spans in layout.owned.values() for span in spans)
        assert [i for lo, hi in owned for i in range(lo, hi)] == list(range(layout.size))


def test_ranks_that_share_a_row_get_equal_bits():
    sharded = ShardedMatrix("GaLore", torch.randn(6, 10), flat_parts((6, 10), [15, 35]), rank=4)
    gradient = torch.randn(6, 10)
    shards = [sharded.shard(rank, gradient) for rank in range(3)]
    programs = [
        lockstep([GaLoreMethod.project(shard, state, sharded.options)])
        for shard, state in zip(shards, sharded.states, strict=True)
    ]
    first, second, _ = (found for (found,) in sharded.world.run(programs))
    assert shards[0].part.rows == (0, 2)
    assert shards[1].part.rows == (1, 4)
    assert shards[0].side == "left"  # the rows are compressed, and the basis has them
    assert torch.equal(first.basis[0, 1], second.basis[0, 0])


def test_single_process_copies_no_basis():
    """In one process a gathered basis is the stored one, not a copy of it."""
    sharded = ShardedMatrix("GaLore", torch.randn(6, 10), flat_parts((6, 10), []), rank=4)
    (rounds,) = sharded.programs(torch.randn(6, 10))
    SingleProcess().run(rounds)
    state = {key: value[None] if torch.is_tensor(value) else value for key, value in sharded.states[0].items()}
    shard = sharded.shard(0, torch.randn(6, 10))
    (found,) = SingleProcess().run(lockstep([GaLoreMethod.project(shard, state, sharded.options)]))
    assert found.basis.data_ptr() == sharded.states[0]["basis"].data_ptr()
