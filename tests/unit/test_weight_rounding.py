"""New bf16 weights are rounded stochastically: the mean is right, and every rank and every cut rounds alike."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_lowrank.linalg.weight_rounding import column_words, round_to_bf16, rounding_keys, row_words
from ds_lowrank.optimizer.stochastic_rounding import ROW, StochasticRounding
from ds_lowrank.sharding.geometry import Geometry
from ds_lowrank.sharding.layout import Block, ContiguousPart
from ds_lowrank.sharding.matrix import MatrixShard, Member
from ds_lowrank.sharding.rounding import write
from ds_lowrank.sharding.updates import Dense, Factors, NewWeights, Quotient, RescaledWeights, ScaledGradient
from tests.simulated.harness import flat_parts, tensor_parallel_parts

CPU = torch.device("cpu")
ULP = 2**-7
"""Between bf16 numbers from 1 to 2."""
PART = 41 / 4096
"""About a hundredth; of one ulp, fp32 can tell it from zero for any weight from 1 to 2."""


def rounded(values, step=0, name="w"):
    """Rows x columns, fp32, as a matrix of that name is rounded in a step."""
    keys = rounding_keys([name], step, CPU)
    height, width = values.shape
    return round_to_bf16(values.unsqueeze(0), *row_words(keys, 0, height), column_words(keys, 0, width))[0]


def shard_on(rank, shape, parts, weight, name="w", gradient=None):
    """A rank's part of a matrix, in bf16; what it writes goes into a tensor of its own."""
    part = parts[rank]
    (r0, r1), (c0, c1) = part.block.rows, part.block.cols
    geometry = Geometry(shape, parts, rank, "right")
    shard = MatrixShard(geometry, [Member(name, geometry.holders[0])])
    given = [weight] if gradient is None else [weight, gradient]
    cut = [tensor[r0:r1, c0:c1].reshape(1, -1)[:, part.start : part.end].clone() for tensor in given]
    shard.attach(cut[-1:], cut[:1])
    return shard


def whole_of(shards, shape):
    """What the ranks' parts are together."""
    found = torch.full(shape, math.nan, dtype=torch.bfloat16)
    for shard in shards:
        for piece in shard.weights.pieces:
            r = piece.rectangle
            found[r.row : r.row + r.height, r.col : r.col + r.width] = piece.values[0]
    return found


def test_a_number_of_bf16_is_not_changed_and_others_go_to_a_neighbour():
    values = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) ** 5
    exact = values.bfloat16()
    assert torch.equal(rounded(exact.float()), exact)
    found = rounded(values)
    below = (values.view(torch.int32) >> 16 << 16).view(torch.float32)
    above = ((values.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    assert ((found.float() == below) | (found.float() == above)).all()
    assert (found.float() == below).any() and (found.float() == above).any()


def test_what_is_not_finite_stays_so_and_nothing_changes_its_sign():
    bits = [0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F810000, 0x00000000, 0x00000001, 0x007FFFFF, 0x7F7F0000]
    positive = torch.tensor(bits, dtype=torch.int32).view(torch.float32).expand(500, -1)
    for values in (positive, (positive.view(torch.int32) | -(2**31)).view(torch.float32)):
        found = rounded(values.contiguous())
        assert torch.equal(found.isnan(), values.isnan()) and torch.equal(found.isinf(), values.isinf())
        assert torch.equal(found.signbit(), values.signbit())


@pytest.mark.parametrize("share", [1 / 65536, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_probability_of_rounding_up_is_the_share_of_the_gap(share, sign):
    """Any two elements and any two steps are independent: the standard error is that of a binomial."""
    steps, size = 64, 256
    dropped = round(share * 65536)
    values = torch.full((size, size), 0x3FC00000 + dropped, dtype=torch.int32).view(torch.float32) * sign  # from 1.5
    up = sum((rounded(values, step).abs() > 1.5).sum().item() for step in range(steps))
    count, p = steps * size * size, dropped / 65536
    assert abs(up - count * p) < 3 * math.sqrt(count * p * (1 - p))


def test_errors_of_many_steps_do_not_add_up_along_one_direction():
    """Weights of one sign, which move by several ulp: the errors' largest singular value is that of independent ones.

    That is ``std (sqrt(m) + sqrt(n))``, which the largest of 512 leaves by less than a tenth. The moments' dither, in
    fixed strides along rows and columns, has six times as much here.
    """
    size, drawn = 512, torch.Generator().manual_seed(1)
    weights = 1 + torch.rand(size, size, generator=drawn)
    errors = torch.zeros(size, size)
    for step in range(32):
        values = weights + 0.05 * torch.rand(size, size, generator=drawn)
        errors += rounded(values, step).float() - values
    assert torch.linalg.matrix_norm(errors, 2) < 1.1 * errors.std() * 2 * math.sqrt(size)


@st.composite
def layouts(draw):
    """A matrix, or a vector of up to three rows of what is rounded as a row, and how it is cut."""
    if draw(st.booleans()):
        shape = 1, draw(st.integers(1, 3 * ROW))
        split = None
    else:
        shape = draw(st.integers(4, 40)), draw(st.integers(4, 40))
        split = draw(st.sampled_from([None, "rows", "columns"]))
    cuts = sorted(draw(st.lists(st.integers(0, shape[0] * shape[1]), max_size=3)))
    return shape, tensor_parallel_parts(shape, split) if split else flat_parts(shape, cuts)


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 2**40), st.text(max_size=5))
def test_every_cut_rounds_alike(layout, step, name):
    shape, parts = layout
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = [ContiguousPart(Block((0, shape[0]), (0, shape[1])), 0, shape[0] * shape[1])]
    found = []
    for cut in (whole, parts):
        shards = [shard_on(rank, shape, cut, weight.bfloat16(), name) for rank, part in enumerate(cut) if part.numel]
        for shard in shards:
            shard.rounding = StochasticRounding([name], step, shape[0] > 1, CPU)
            for piece in shard.weights.dense_pieces:
                r = piece.rectangle
                write(shard, piece, weight[None, r.row : r.row + r.height, r.col : r.col + r.width].clone())
        found.append(whole_of(shards, shape))
    assert torch.equal(*found)


def test_matrices_steps_and_neighbours_are_rounded_independently():
    values = torch.full((64, 64), 1 + ULP / 2)
    ups = [rounded(values, step, name).float() > 1 for step, name in ((0, "w"), (1, "w"), (0, "v"))]
    for one, other in [(ups[0], ups[1]), (ups[0], ups[2]), (ups[0], ups[0].T), (ups[0][1:], ups[0][:-1])]:
        together = (one & other).double().mean().item()
        assert abs(together - 1 / 4) < 3 * math.sqrt(3 / 16 / one.numel())


LAYOUTS = {
    "whole": ((48, 40), flat_parts((48, 40), [])),
    "cut within rows": ((48, 40), flat_parts((48, 40), [333, 1000])),
    "rows over tensor ranks": ((48, 40), tensor_parallel_parts((48, 40), "rows")),
    "columns over tensor ranks": ((48, 40), tensor_parallel_parts((48, 40), "columns")),
    "a vector": ((1, ROW + 300), flat_parts((1, ROW + 300), [1000])),
}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "sign"), [*((layout, 1) for layout in LAYOUTS), ("whole", -1)])
def test_a_thousand_updates_of_a_hundredth_of_the_last_place_add_up(layout, sign):
    """To the nearest, none of them would move anything. Two replicas of each part end with the same bits."""
    shape, parts = LAYOUTS[layout]
    steps, weight = 1000, torch.full(shape, 1.5, dtype=torch.bfloat16)
    replicas = [[shard_on(rank, shape, parts, weight) for rank in range(len(parts))] for _ in range(2)]
    update = Dense(lambda piece: torch.full(piece.values.shape, sign * PART * ULP), 1.0)
    for step in range(steps):
        for shard in replicas[0] + replicas[1]:
            shard.rounding = StochasticRounding(shard.names, step, shape[0] > 1, CPU)
            update.write_to(shard, 1.0, 0.0)
    found, other = (whole_of(shards, shape) for shards in replicas)
    assert torch.equal(found, other)
    moved = (1.5 - found.double()) / ULP
    error = math.sqrt(steps * PART * (1 - PART) / moved.numel())
    assert abs(moved.mean().item() - sign * steps * PART) < 3 * error
    # The elements move independently: the variance over them is that of a binomial, give or take its own error.
    spread = moved.var().item() / (steps * PART * (1 - PART))
    assert abs(spread - 1) < 4 * math.sqrt(2 / moved.numel())


STEP = 0.3 * ULP
"""Every update of :data:`UPDATES` takes this much from weights of 1.5, or leads to 1.5 minus this."""


def ones(shard, axis, factor=1.0):
    return torch.full((1, axis(shard).held_rows, 1), factor)


def filled(value):
    return lambda piece: torch.full(piece.values.shape, value)


UPDATES = {
    "Factors": lambda s: Factors(ones(s, lambda s: s.kept), ones(s, lambda s: s.compressed), STEP),
    "ScaledGradient": lambda s: ScaledGradient(ones(s, lambda s: s.kept), [STEP]),
    "Dense": lambda s: Dense(filled(1.0), STEP),
    "Quotient": lambda s: Quotient(filled(2.0), filled(2.0), STEP),
    "RescaledWeights": lambda s: RescaledWeights(
        s.kept,
        ones(s, lambda s: s.kept, 1 - STEP / 3),
        ones(s, lambda s: s.kept, STEP / 2),
        ones(s, lambda s: s.compressed),
    ),
    "NewWeights": lambda s: NewWeights(filled(1.5 - STEP)),
    "weight decay": lambda s: Dense(filled(0.0), 1.0),
}


@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("cuts", [[], [1000]], ids=["whole", "cut"])
def test_every_kind_of_update_is_rounded_stochastically_and_once(kind, cuts):
    shape = 64, 48
    parts, decay = flat_parts(shape, cuts), STEP / 1.5 if kind == "weight decay" else 0.0
    weight, gradient = torch.full(shape, 1.5, dtype=torch.bfloat16), torch.ones(shape, dtype=torch.bfloat16)
    found = []
    for rounds in (False, True):
        shards = [shard_on(rank, shape, parts, weight, gradient=gradient) for rank in range(len(parts))]
        for shard in shards:
            shard.rounding = StochasticRounding(["w"], 5, True, CPU) if rounds else None
            UPDATES[kind](shard).write_to(shard, 1.0, decay)
        found.append(whole_of(shards, shape))
    assert torch.equal(found[0], weight), "to the nearest, nothing moves"
    assert set(found[1].unique().tolist()) == {1.5, 1.5 - ULP}
    share, count = (found[1] < 1.5).double().mean().item(), weight.numel()
    assert abs(share - 0.3) < 3 * math.sqrt(0.3 * 0.7 / count)
