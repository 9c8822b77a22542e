"""GaLore on every layout of the simulated world against its dense reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.methods.galore import GaLore, GaLoreOptions
from ds_lowrank.sharding.layout import Block, Part
from ds_lowrank.sharding.matrix import MatrixShard
from ds_lowrank.sharding.reduce import Alone, lockstep
from ds_lowrank.sharding.world import SimulatedWorld
from tests.reference.galore import DenseGaLore, positive_qr, sketch


class Sharded:
    """One matrix over the parts of a simulated world."""

    def __init__(self, weight, parts, options, name="w"):
        self.weight, self.parts, self.options = weight, parts, options
        shape, world = tuple(weight.shape), len(parts)
        factor_rank = max(range(world), key=lambda i: parts[i].numel)
        side = GaLore.side(shape, options)
        self.shards = [MatrixShard(name, shape, parts, i, side, factor_rank) for i in range(world)]
        self.states = [GaLore.init_state(s, options, torch.device("cpu")) for s in self.shards]
        self.world, self.t = SimulatedWorld(world), 0

    def cut(self, tensor, part):
        (r0, r1), (c0, c1) = part.block.rows, part.block.cols
        return tensor[r0:r1, c0:c1].reshape(-1)[part.start : part.end].clone()

    def programs(self, gradient):
        for shard in self.shards:
            shard.attach(self.cut(gradient, shard.part))
        return [
            lockstep([whole_step(shard, state, self.options, self.t)])
            for shard, state in zip(self.shards, self.states, strict=True)
        ]

    def step(self, gradient):
        updates = self.world.run(self.programs(gradient))
        self.t += 1
        for shard, (update,) in zip(self.shards, updates, strict=True):
            flat = self.cut(self.weight, shard.part)
            shard.write(flat, update, self.options.lr, self.options.lr * self.options.weight_decay)
            (r0, r1), (c0, c1) = shard.part.block.rows, shard.part.block.cols
            block = self.weight[r0:r1, c0:c1].reshape(-1)
            block[shard.part.start : shard.part.end] = flat
            self.weight[r0:r1, c0:c1] = block.view(r1 - r0, c1 - c0)


def whole_step(shard, state, options, step):
    """Both halves of a step, for a gradient that is known to be finite and not zero."""
    seen = yield from GaLore.project(shard, state, options, step)
    return (yield from GaLore.update(shard, state, options, step, seen))


def flat_parts(shape, cuts):
    m, n = shape
    bounds = [0, *sorted(cuts), m * n]
    return [Part(Block((0, m), (0, n)), a, b) for a, b in itertools.pairwise(bounds)]


def relative_error(shape, parts, steps=4, **options):
    """Some steps from zero weights, crossing two refreshes: the difference of the summed updates, and the matrix.

    With the usual epsilon Adam's direction is all but a sign: it turns a rounding error of 1e-7 in a projected element
    that happens to be 1e-3 into an error of 1e-4. One of 0.1 bounds the factor by ten.
    """
    torch.manual_seed(0)
    options = {"rank": 4, "update_proj_gap": 2, "lr": 1e-2, "eps": 0.1, **options}
    dense = DenseGaLore(torch.zeros(shape), **options)
    sharded = Sharded(torch.zeros(shape), parts, GaLoreOptions(**options))
    for _ in range(steps):
        gradient = torch.randn(shape)
        dense.step(gradient)
        sharded.step(gradient)
    return ((sharded.weight - dense.weight).norm() / dense.weight.norm()).item(), sharded


def compare(shape, parts, bound=1e-6, **options):
    error, sharded = relative_error(shape, parts, **options)
    assert error < bound, f"{error:.1e}"
    return sharded


def rounding_bound(shape, rank, steps=4, gap=2):
    """Four roundings of fp32, times the condition of the sketched gradients of `relative_error`, at least 2e-6.

    A basis is as sensitive as the sketch it is read off; a sketch of nearly as many columns as the matrix has can be
    badly conditioned. Of 8000 random cases the worst stayed at a quarter of it.
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
    return max(2e-6, 4 * torch.finfo(torch.float32).eps * condition)


OPTIONS = [
    {},
    {"proj_type": "reverse_std"},
    {"proj_type": "left"},
    {"proj_type": "right"},
    {"projector": "svd"},
    {"projector": "svd", "proj_type": "reverse_std"},
    {"moments": "rotate"},
    {"moments": "rotate", "projector": "svd", "proj_type": "left"},
    {"weight_decay": 0.1, "scale": 1.0, "betas": (0.8, 0.95)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(17, 9), (9, 17), (12, 12)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_option_on_every_world(shape, ranks, options):
    numel = shape[0] * shape[1]
    cuts = [numel * i // ranks + 1 for i in range(1, ranks)]
    compare(shape, flat_parts(shape, cuts), **options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_any_cut(data):
    shape = data.draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    ranks = data.draw(st.integers(1, 6))
    cuts = data.draw(st.lists(st.integers(0, shape[0] * shape[1]), min_size=ranks - 1, max_size=ranks - 1))
    rank = data.draw(st.integers(1, 6))
    compare(shape, flat_parts(shape, cuts), rounding_bound(shape, rank), rank=rank)


@pytest.mark.parametrize("split", ["rows", "columns"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tensor_parallel_blocks_further_split_by_data_ranks(split, options):
    """Four ranks: two halves of the logical matrix, each cut inside a row over two data-parallel ranks."""
    m, n = 14, 22
    halves = (
        [Block((0, 6), (0, n)), Block((6, m), (0, n))]
        if split == "rows"
        else [Block((0, m), (0, 10)), Block((0, m), (10, n))]
    )
    parts = [Part(b, lo, hi) for b in halves for lo, hi in ((0, b.numel // 3), (b.numel // 3, b.numel))]
    compare((m, n), parts, **options)


def test_a_row_shared_by_many_ranks_has_one_owner():
    sharded = compare((5, 40), flat_parts((5, 40), [3, 11, 12, 39, 60]), rank=3)
    for axis in ("kept", "compressed"):
        owned = sorted(span for shard in sharded.shards for span in getattr(shard, axis).owned)
        size = getattr(sharded.shards[0], axis).size
        assert [i for lo, hi in owned for i in range(lo, hi)] == list(range(size))


def test_state_over_all_ranks_is_exactly_one_process():
    """Bytes of moments and bases do not depend on the number of ranks: rank * (2 kept + compressed) elements."""
    for ranks in (1, 2, 3, 7):
        sharded = compare((30, 20), flat_parts((30, 20), [600 * i // ranks + 1 for i in range(1, ranks)]))
        elements = sum(t.numel() for state in sharded.states for t in state.values())
        assert elements == 4 * (2 * 30 + 20)


def test_rounds_do_not_grow_with_the_number_of_matrices():
    counts = []
    for matrices in (1, 9):
        options = GaLoreOptions(rank=4, update_proj_gap=2)
        many = [
            Sharded(torch.randn(12, 8), flat_parts((12, 8), [31, 50]), options, name=f"w{i}") for i in range(matrices)
        ]
        rounds = []
        for _ in range(2):
            world = SimulatedWorld(3)
            for one in many:
                one.programs(torch.randn(12, 8))
            world.run(
                [lockstep([whole_step(one.shards[k], one.states[k], options, one.t) for one in many]) for k in range(3)]
            )
            for one in many:
                one.t += 1
            rounds.append(world.rounds)
        counts.append(rounds)
    assert counts == [[10, 3], [10, 3]]


def test_ranks_that_share_a_row_get_the_same_bits():
    options = GaLoreOptions(rank=4)
    sharded = Sharded(torch.randn(6, 10), flat_parts((6, 10), [15, 35]), options)
    updates = sharded.world.run(sharded.programs(torch.randn(6, 10)))
    first, second = (update for (update,) in updates[:2])
    assert sharded.shards[0].part.rows == (0, 2)
    assert sharded.shards[1].part.rows == (1, 4)
    same = (first.kept, second.kept) if sharded.shards[0].side == "right" else (first.compressed, second.compressed)
    assert torch.equal(same[0][1], same[1][0])


def test_alone_copies_nothing():
    """In one process a gathered basis is the stored one, not a copy of it."""
    options = GaLoreOptions(rank=4)
    sharded = Sharded(torch.randn(6, 10), flat_parts((6, 10), []), options)
    (rounds,) = sharded.programs(torch.randn(6, 10))
    Alone().run(rounds)
    (seen,) = Alone().run(lockstep([GaLore.project(sharded.shards[0], sharded.states[0], options, 1)]))
    assert seen.basis.data_ptr() == sharded.states[0]["basis"].data_ptr()
